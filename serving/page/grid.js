/**
 * How patches lie over the picture. Places in the picture are fractions (u, v) of its width and
 * height, so that they mean the same to every model and input size.
 */
export class Grid {
  /**
   * @param {number} rows of the feature map
   * @param {number} columns of it
   * @param {{source_size: number[], input_size: number[], valid_region: number[]}} geometry from
   *   the answer's metadata
   */
  constructor(rows, columns, geometry) {
    const [height, width] = geometry.input_size;
    const [, , right, bottom] = geometry.valid_region;
    this.rows = rows;
    this.columns = columns;
    this.source = geometry.source_size;
    this.input = geometry.input_size;
    /** Pixels of the input a patch covers. */
    this.stride = [height / rows, width / columns];
    /** Patches the picture spans, counted in fractions: less than the grid where it is padded. */
    this.spanRows = bottom / this.stride[0];
    this.spanColumns = right / this.stride[1];
    /** Patches that show any of the picture. */
    this.usedRows = Math.min(rows, Math.ceil(this.spanRows - 1e-6));
    this.usedColumns = Math.min(columns, Math.ceil(this.spanColumns - 1e-6));
  }

  /** Indices, row by row, of the patches that show any of the picture. */
  get used() {
    const found = new Int32Array(this.usedRows * this.usedColumns);
    let next = 0;
    for (let row = 0; row < this.usedRows; row++) {
      for (let column = 0; column < this.usedColumns; column++) found[next++] = row * this.columns + column;
    }
    return found;
  }

  /**
   * The patch at a place.
   * @param {number} u
   * @param {number} v
   */
  at(u, v) {
    return {
      row: clamp(Math.floor(v * this.spanRows), this.usedRows - 1),
      column: clamp(Math.floor(u * this.spanColumns), this.usedColumns - 1),
    };
  }

  /**
   * Where a patch lies, as fractions of the picture.
   * @param {number} row
   * @param {number} column
   */
  box(row, column) {
    const left = column / this.spanColumns;
    const top = row / this.spanRows;
    return {
      left,
      top,
      width: Math.min(1, (column + 1) / this.spanColumns) - left,
      height: Math.min(1, (row + 1) / this.spanRows) - top,
    };
  }

  /**
   * The middle of a patch, or of what the picture has of it.
   * @param {number} row
   * @param {number} column
   */
  middle(row, column) {
    const { left, top, width, height } = this.box(row, column);
    return { u: left + width / 2, v: top + height / 2 };
  }
}

/**
 * @param {number} value
 * @param {number} most
 */
function clamp(value, most) {
  return Math.max(0, Math.min(most, value));
}
