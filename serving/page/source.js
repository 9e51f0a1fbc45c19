/** Gets feature maps from the endpoint and keeps the last ones, so that going back costs nothing. */

import { FeatureMap } from "./features.js";
import { featuresUrl } from "./query.js";

const KEPT_BYTES = 256e6;

/**
 * @typedef {object} Answer
 * @property {FeatureMap} map
 * @property {number} ms from asking to the last byte
 * @property {number} bytes
 */

export class Source {
  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this.api = api;
    /** @type {Map<string, Answer>} oldest first */
    this.kept = new Map();
  }

  /**
   * @param {import("./pictures.js").Picture} picture
   * @param {import("./query.js").Wanted} wanted
   * @param {string} version of the model
   * @param {{signal: AbortSignal, onWait: (seconds: number) => void}} options
   * @returns {Promise<Answer>}
   */
  async get(picture, wanted, version, { signal, onWait }) {
    const url = featuresUrl(wanted);
    const key = `${picture.id} ${version} ${url}`;
    const known = this.kept.get(key);
    if (known) {
      this.kept.delete(key);
      this.kept.set(key, known);
      return known;
    }
    let began = performance.now();
    const response = await this.api.post(url, picture.blob, {
      accept: "application/x-safetensors",
      signal,
      onWait: (seconds) => {
        began = performance.now(); // The time of the attempt that was answered is what counts.
        onWait(seconds);
      },
    });
    const file = await response.arrayBuffer();
    const answer = { ms: performance.now() - began, bytes: file.byteLength, map: FeatureMap.read(file) };
    this.kept.set(key, answer);
    this.#forget();
    return answer;
  }

  #forget() {
    let total = 0;
    for (const { map } of this.kept.values()) total += map.data.byteLength;
    for (const [key, { map }] of this.kept) {
      if (total <= KEPT_BYTES || this.kept.size === 1) return;
      this.kept.delete(key);
      total -= map.data.byteLength;
    }
  }
}
