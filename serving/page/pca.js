/**
 * Principal components of patch features, for colours.
 *
 * Features lie channel by channel ([D, N], as the endpoint sends maps), so every inner loop runs
 * along patches and no transposing is needed. The basis comes from a sample of the patches by
 * subspace iteration, which starts from fixed numbers: the same features give the same colours.
 */

const SAMPLE = 400;
const BLOCK = 6;
const ROUNDS = 8;

/**
 * @param {Float32Array} data [D, N]
 * @param {number} width D
 * @param {Int32Array} used patches that count
 * @param {number} [count] components wanted, 6 at most
 * @returns {{projections: Float32Array[], explained: number}} each [N]; the share of the sample's
 *   variance that they hold
 */
export function principalComponents(data, width, used, count = 3) {
  const total = data.length / width;
  const sample = sampled(used);
  const size = sample.length;
  const { centred, means } = gathered(data, width, total, sample);
  const block = Math.min(BLOCK, width, size);
  let basis = starting(width, block);
  for (let round = 0; round < ROUNDS; round++) {
    basis = orthonormal(lifted(centred, size, projected(centred, size, basis)));
  }
  const scores = projected(centred, size, basis);
  const gram = scores.map((a) => scores.map((b) => dot(a, b)));
  const { values, vectors } = symmetricEigen(gram);
  let variance = 0;
  for (let i = 0; i < centred.length; i++) variance += centred[i] * centred[i];
  const projections = [];
  let held = 0;
  for (let c = 0; c < count; c++) {
    if (c >= block) {
      projections.push(new Float32Array(total));
      continue;
    }
    held += values[c];
    const direction = combined(basis, vectors[c], width);
    projections.push(signed(projection(data, width, total, means, direction), direction, used));
  }
  return { projections, explained: variance > 0 ? held / variance : 0 };
}

/**
 * Spreads values over 0 to 1 between two of their percentiles, so that a few odd patches do not
 * wash out the rest.
 * @param {Float32Array} values changed
 * @param {Int32Array} used
 */
export function spread(values, used) {
  const sorted = Float32Array.from(used, (i) => values[i]).sort();
  const low = sorted[Math.floor(0.02 * (sorted.length - 1))];
  const high = sorted[Math.ceil(0.98 * (sorted.length - 1))];
  for (let i = 0; i < values.length; i++) {
    values[i] = high > low ? Math.max(0, Math.min(1, (values[i] - low) / (high - low))) : 0.5;
  }
  return values;
}

/** @param {Int32Array} used */
function sampled(used) {
  if (used.length <= SAMPLE) return used;
  // A stride with a fraction walks through the columns, so no column is favoured.
  return Int32Array.from({ length: SAMPLE }, (_, i) => used[Math.floor((i * used.length) / SAMPLE)]);
}

/**
 * @param {Float32Array} data
 * @param {number} width
 * @param {number} total
 * @param {Int32Array} sample
 */
function gathered(data, width, total, sample) {
  const size = sample.length;
  const centred = new Float32Array(width * size);
  const means = new Float32Array(width);
  for (let d = 0; d < width; d++) {
    let sum = 0;
    for (let i = 0; i < size; i++) {
      const value = data[d * total + sample[i]];
      centred[d * size + i] = value;
      sum += value;
    }
    means[d] = sum / size;
    for (let i = 0; i < size; i++) centred[d * size + i] -= means[d];
  }
  return { centred, means };
}

/**
 * Fixed numbers that favour no direction.
 * @param {number} width
 * @param {number} block
 */
function starting(width, block) {
  let state = 12345;
  const next = () => {
    state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff;
    return state / 0x3fffffff - 1;
  };
  return orthonormal(Array.from({ length: block }, () => Float64Array.from({ length: width }, next)));
}

/**
 * @param {Float32Array} centred [D, n]
 * @param {number} size n
 * @param {Float64Array[]} basis vectors [D]
 * @returns {Float64Array[]} vectors [n]
 */
function projected(centred, size, basis) {
  return basis.map((vector) => {
    const out = new Float64Array(size);
    for (let d = 0; d < vector.length; d++) {
      const weight = vector[d];
      const start = d * size;
      for (let i = 0; i < size; i++) out[i] += weight * centred[start + i];
    }
    return out;
  });
}

/**
 * @param {Float32Array} centred [D, n]
 * @param {number} size n
 * @param {Float64Array[]} scores vectors [n]
 * @returns {Float64Array[]} vectors [D]
 */
function lifted(centred, size, scores) {
  const width = centred.length / size;
  return scores.map((score) => {
    const out = new Float64Array(width);
    for (let d = 0; d < width; d++) {
      const start = d * size;
      let sum = 0;
      for (let i = 0; i < size; i++) sum += score[i] * centred[start + i];
      out[d] = sum;
    }
    return out;
  });
}

/**
 * Gram and Schmidt's way, in place; what is left of a dependent vector becomes zero.
 * @param {Float64Array[]} vectors
 */
function orthonormal(vectors) {
  vectors.forEach((vector, index) => {
    const before = Math.sqrt(dot(vector, vector));
    // Twice is enough to lose what rounding leaves.
    for (let again = 0; again < 2; again++) {
      for (let other = 0; other < index; other++) {
        const part = dot(vector, vectors[other]);
        for (let d = 0; d < vector.length; d++) vector[d] -= part * vectors[other][d];
      }
    }
    const norm = Math.sqrt(dot(vector, vector));
    const scale = norm > 1e-9 * before ? 1 / norm : 0;
    for (let d = 0; d < vector.length; d++) vector[d] *= scale;
  });
  return vectors;
}

/**
 * Eigenvalues of a small symmetric matrix, largest first, by Jacobi's rotations.
 * @param {number[][]} matrix changed
 */
function symmetricEigen(matrix) {
  const n = matrix.length;
  const rotation = matrix.map((_, i) => matrix.map((__, j) => (i === j ? 1 : 0)));
  for (let sweep = 0; sweep < 30; sweep++) {
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        if (Math.abs(matrix[p][q]) <= 1e-14 * Math.sqrt(Math.abs(matrix[p][p] * matrix[q][q]))) continue;
        const theta = (matrix[q][q] - matrix[p][p]) / (2 * matrix[p][q]);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
        const c = 1 / Math.sqrt(t * t + 1);
        const s = t * c;
        for (const rows of [matrix, rotation]) {
          for (const row of rows) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
        }
        for (let k = 0; k < n; k++) {
          const [a, b] = [matrix[p][k], matrix[q][k]];
          [matrix[p][k], matrix[q][k]] = [c * a - s * b, s * a + c * b];
        }
      }
    }
  }
  const order = matrix.map((_, i) => i).sort((a, b) => matrix[b][b] - matrix[a][a]);
  return {
    values: order.map((i) => matrix[i][i]),
    vectors: order.map((i) => rotation.map((row) => row[i])),
  };
}

/**
 * @param {Float64Array[]} basis
 * @param {number[]} weights
 * @param {number} width
 */
function combined(basis, weights, width) {
  const out = new Float64Array(width);
  basis.forEach((vector, index) => {
    for (let d = 0; d < width; d++) out[d] += weights[index] * vector[d];
  });
  return out;
}

/**
 * @param {Float32Array} data
 * @param {number} width
 * @param {number} total
 * @param {Float32Array} means
 * @param {Float64Array} direction
 */
function projection(data, width, total, means, direction) {
  const out = new Float32Array(total);
  for (let d = 0; d < width; d++) {
    const weight = direction[d];
    const start = d * total;
    const shift = means[d];
    for (let i = 0; i < total; i++) out[i] += weight * (data[start + i] - shift);
  }
  return out;
}

/**
 * A component has no sign of its own. The rarer side is made the bright one, which is mostly what
 * stands in front; where the sides balance, the strongest channel decides.
 * @param {Float32Array} values changed
 * @param {Float64Array} direction
 * @param {Int32Array} used
 */
function signed(values, direction, used) {
  let cubes = 0;
  let squares = 0;
  for (const i of used) {
    squares += values[i] ** 2;
    cubes += values[i] ** 3;
  }
  const skew = squares > 0 ? (cubes * Math.sqrt(used.length)) / squares ** 1.5 : 0;
  const strongest = direction.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
  if ((Math.abs(skew) > 0.05 ? skew : strongest) < 0) {
    for (let i = 0; i < values.length; i++) values[i] = -values[i];
  }
  return values;
}

/**
 * @param {ArrayLike<number>} a
 * @param {ArrayLike<number>} b
 */
function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
