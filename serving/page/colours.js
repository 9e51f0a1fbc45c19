/** Colours of maps: principal components, and similarity from dark to bright. */

/** Magma at equal steps; matplotlib's, CC0. Even in lightness, so that it reads in greys, too. */
const ANCHORS = [
  [0, 0, 4], [11, 9, 36], [32, 17, 75], [59, 15, 112], [87, 21, 126], [114, 31, 129],
  [140, 41, 129], [168, 50, 125], [196, 60, 117], [222, 73, 104], [241, 96, 93], [250, 127, 94],
  [254, 159, 109], [254, 191, 132], [253, 222, 160], [252, 253, 191],
]; // prettier-ignore

/** Of OKLab: darkest and lightest, and how far from grey colours go. */
const LIGHTNESS = [0.25, 0.93];
const CHROMA = 0.15;
const CLASS_LIGHTNESS = 0.72;
const GOLDEN_ANGLE = Math.PI * (3 - Math.sqrt(5));

/** RGB of 256 steps. */
const HEAT = new Uint8ClampedArray(768);
for (let step = 0; step < 256; step++) {
  const at = (step / 255) * (ANCHORS.length - 1);
  const low = Math.min(Math.floor(at), ANCHORS.length - 2);
  for (let c = 0; c < 3; c++) {
    HEAT[3 * step + c] = ANCHORS[low][c] + (at - low) * (ANCHORS[low + 1][c] - ANCHORS[low][c]);
  }
}

/**
 * The step of the scale that a value has.
 * @param {number} value
 * @param {{low: number, high: number}} range
 */
function step(value, { low, high }) {
  return high > low ? Math.max(0, Math.min(255, Math.round(((value - low) / (high - low)) * 255))) : 255;
}

/**
 * @param {number} value
 * @param {{low: number, high: number}} range
 * @returns {string} a colour for CSS
 */
export function heatColour(value, range) {
  const at = 3 * step(value, range);
  return `rgb(${HEAT[at]} ${HEAT[at + 1]} ${HEAT[at + 2]})`;
}

/**
 * Paints a map of a grid, a pixel a patch, cut to what the picture covers.
 * @param {HTMLCanvasElement} canvas
 * @param {import("./grid.js").Grid} grid
 * @param {(index: number, rgb: Uint8ClampedArray, at: number) => void} colour writes a patch's
 */
function paint(canvas, grid, colour) {
  canvas.width = grid.usedColumns;
  canvas.height = grid.usedRows;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(canvas.width, canvas.height);
  grid.used.forEach((index, position) => {
    colour(index, image.data, 4 * position);
    image.data[4 * position + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

/**
 * Three components as colours: the first as lightness, the others as green to red and blue to
 * yellow. In OKLab equal steps look equal, so that no component outshines the others, as it would
 * as red, green or blue.
 * @param {HTMLCanvasElement} canvas
 * @param {import("./grid.js").Grid} grid
 * @param {Float32Array[]} components three, [N] each, from 0 to 1
 */
export function paintComponents(canvas, grid, [first, second, third]) {
  paint(canvas, grid, (index, rgb, at) => {
    const light = LIGHTNESS[0] + (LIGHTNESS[1] - LIGHTNESS[0]) * first[index];
    rgb.set(ofOklab(light, CHROMA * (2 * second[index] - 1), CHROMA * (2 * third[index] - 1)), at);
  });
}

/**
 * A colour for each class, those of neighbouring numbers far apart.
 * @param {number} index of the class
 * @returns {[number, number, number]} sRGB, 0 to 255
 */
export function classColour(index) {
  const angle = index * GOLDEN_ANGLE;
  const colour = ofOklab(CLASS_LIGHTNESS, CHROMA * Math.cos(angle), CHROMA * Math.sin(angle));
  return /** @type {[number, number, number]} */ (colour.map((c) => Math.max(0, Math.min(255, Math.round(c)))));
}

/**
 * A colour of OKLab as sRGB, 0 to 255 where it can be shown.
 * @param {number} light
 * @param {number} red from green
 * @param {number} yellow from blue
 */
function ofOklab(light, red, yellow) {
  const l = (light + 0.3963377774 * red + 0.2158037573 * yellow) ** 3;
  const m = (light - 0.1055613458 * red - 0.0638541728 * yellow) ** 3;
  const s = (light - 0.0894841775 * red - 1.291485548 * yellow) ** 3;
  return [
    encoded(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
    encoded(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
    encoded(-0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s),
  ];
}

/**
 * Linear light as sRGB's byte.
 * @param {number} value
 */
function encoded(value) {
  return 255 * (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055);
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {import("./grid.js").Grid} grid
 * @param {Float32Array} values [N]
 * @param {{low: number, high: number}} range
 */
export function paintHeat(canvas, grid, values, range) {
  paint(canvas, grid, (index, rgb, at) => {
    const from = 3 * step(values[index], range);
    for (let c = 0; c < 3; c++) rgb[at + c] = HEAT[from + c];
  });
}

/**
 * The scale as a strip.
 * @param {HTMLCanvasElement} canvas
 */
export function paintScale(canvas) {
  canvas.width = 256;
  canvas.height = 1;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = HEAT[3 * i + c];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
