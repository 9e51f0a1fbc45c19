/** Reads safetensors: a length, a JSON header, raw little-endian tensors. */

/**
 * @typedef {object} Tensor
 * @property {number[]} shape
 * @property {Float32Array} data
 */

/** @type {Float32Array | undefined} */
let halves;

/** Every float16 as float32, by its bits; a look-up is the fastest decoding there is. */
function halfTable() {
  if (halves) return halves;
  halves = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 0) halves[bits] = sign * fraction * 2 ** -24;
    else if (exponent === 31) halves[bits] = fraction ? NaN : sign * Infinity;
    else halves[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return halves;
}

/**
 * @param {ArrayBuffer} buffer of float16
 * @returns {Float32Array}
 */
export function fromHalves(buffer) {
  const table = halfTable();
  const bits = new Uint16Array(buffer);
  const values = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) values[i] = table[bits[i]];
  return values;
}

/**
 * @param {ArrayBuffer} file
 * @returns {{tensors: Record<string, Tensor>, metadata: Record<string, string>}} float16 and
 *   float32 tensors, both as float32
 */
export function readSafetensors(file) {
  const length = Number(new DataView(file).getBigUint64(0, true));
  if (length > file.byteLength - 8) throw new Error("the answer is cut off");
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length)));
  const { __metadata__: metadata = {}, ...entries } = header;
  /** @type {Record<string, Tensor>} */
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(entries)) {
    const bytes = file.slice(8 + length + offsets[0], 8 + length + offsets[1]);
    if (dtype === "F16") tensors[name] = { shape, data: fromHalves(bytes) };
    else if (dtype === "F32") tensors[name] = { shape, data: new Float32Array(bytes) };
    else throw new Error(`${name} is ${dtype}, which this page does not read`);
  }
  return { tensors, metadata };
}
