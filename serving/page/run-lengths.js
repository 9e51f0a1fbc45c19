/** Masks in COCO's compressed run lengths. */

/**
 * @param {string} counts
 * @param {[number, number]} size [height, width]
 * @returns {Uint8Array} 1 inside, down the columns: at `column * height + row`
 */
export function decodeMask(counts, [height, width]) {
  const mask = new Uint8Array(height * width);
  /** @type {number[]} */
  const runs = [];
  let value = 0;
  let shift = 0;
  let at = 0;
  for (let i = 0; i < counts.length; i++) {
    // Five bits of a number and a flag for more, from "0" on.
    const digit = counts.charCodeAt(i) - 48;
    value += (digit & 31) * 2 ** shift;
    shift += 5;
    if (digit & 32) continue;
    if (digit & 16) value -= 2 ** shift;
    // A run with more than two before it is a difference from the one two before.
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
    if (runs.length % 2 === 0) mask.fill(1, at, at + value);
    at += value;
    value = shift = 0;
  }
  return mask;
}
