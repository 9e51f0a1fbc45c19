/** Talks to the endpoint: keys, waiting when it is busy, problems as it tells them. */

const KEY = "mimray.key";
const MAX_TRIES = 8;
const LONGEST_WAIT_S = 60;

/** What to do, where the endpoint's own words leave it open. */
const ADVICE = {
  0: "Check that the server is running and that you are connected.",
  413: "Choose a smaller input size or a smaller picture.",
  415: "Save the picture as JPEG, PNG or WebP.",
  422: "Try another picture, or save this one as JPEG, PNG or WebP.",
  500: "The server's log says more.",
};

/** An answer that is no features: what is wrong, and what to do. */
export class Problem extends Error {
  /**
   * @param {number} status of HTTP; 0 where nothing answered
   * @param {string} detail
   */
  constructor(status, detail) {
    super(detail.charAt(0).toUpperCase() + detail.slice(1));
    this.status = status;
    this.advice = ADVICE[/** @type {keyof typeof ADVICE} */ (status)] ?? "";
  }
}

export class Api {
  /**
   * @param {(wrong: boolean) => Promise<string>} askKey gets a key from the person, or "" if they
   *   will not say; told whether the one before was wrong
   */
  constructor(askKey) {
    this.askKey = askKey;
    this.asking = /** @type {Promise<string> | null} */ (null);
  }

  /** The key, kept for this tab only; never in a URL. */
  get key() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return this.unstored ?? "";
    }
  }

  set key(value) {
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      this.unstored = value;
    }
  }

  /** @returns {Promise<Record<string, any>[]>} what is served */
  async models() {
    const response = await this.send("/v1/models", {});
    return (await response.json()).data;
  }

  /**
   * Sends a picture.
   * @param {string} url path and query
   * @param {Blob} picture
   * @param {{accept: string, signal?: AbortSignal, onWait?: (seconds: number) => void}} options
   * @returns {Promise<Response>}
   */
  post(url, picture, { accept, signal, onWait }) {
    const headers = { Accept: accept, "Content-Type": picture.type || "application/octet-stream" };
    return this.send(url, { method: "POST", headers, body: picture, signal }, onWait);
  }

  /**
   * @param {string} url
   * @param {RequestInit} init
   * @param {(seconds: number) => void} [onWait] told how long is waited, 0 when it is over
   */
  async send(url, init, onWait = () => {}) {
    for (let attempt = 1; ; attempt++) {
      const used = this.key;
      const headers = { ...init.headers, ...(used && { Authorization: `Bearer ${used}` }) };
      const response = await fetch(url, { ...init, headers }).catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Problem(0, "The endpoint did not answer.");
      });
      if (response.ok) return response;
      const problem = await problemOf(response);
      if (attempt >= MAX_TRIES) throw problem;
      if (response.status === 401) {
        // Requests refused together ask once; one that was sent before the key changed tries the new.
        if (this.key === used && !(await this.#newKey(Boolean(used)))) throw problem;
      } else if (response.status === 429 || response.status === 503) {
        const seconds = Math.min(LONGEST_WAIT_S, Number(response.headers.get("Retry-After")) || 1);
        await countdown(seconds, onWait, init.signal);
      } else {
        throw problem;
      }
    }
  }

  /** @param {boolean} wrong */
  async #newKey(wrong) {
    this.asking ??= this.askKey(wrong).finally(() => {
      this.asking = null;
    });
    const key = await this.asking;
    if (key) this.key = key;
    return key;
  }
}

/** @param {Response} response */
async function problemOf(response) {
  const text = await response.text();
  try {
    const { detail, title } = JSON.parse(text);
    return new Problem(response.status, detail || title);
  } catch {
    return new Problem(response.status, `The endpoint answered with status ${response.status}.`);
  }
}

/**
 * @param {number} seconds
 * @param {(seconds: number) => void} onWait
 * @param {AbortSignal | null} [signal]
 */
async function countdown(seconds, onWait, signal) {
  for (let left = seconds; left > 0; left--) {
    onWait(left);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    signal?.throwIfAborted();
  }
  onWait(0);
}
