/** Small helpers for elements. */

/**
 * An element by its id; it must be there.
 * @param {string} id
 * @returns {HTMLElement & Record<string, any>}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return found;
}

/**
 * Makes an element. Text is never read as HTML.
 * @param {string} tag
 * @param {Record<string, any>} [properties] `class`, `text`, `dataset`, `on` (listeners); what has a
 *   dash or is `role` or `for` becomes an attribute, everything else a property
 * @param {...(Node|string)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/**
 * Tells people who do not see the page what happened; they hear only the latest.
 * @param {string} text
 */
export function announce(text) {
  byId("status").textContent = text;
}

/**
 * Calls a function once things have been quiet for a while.
 * @template {any[]} A
 * @param {(...args: A) => void} call
 * @param {number} wait milliseconds
 */
export function debounced(call, wait) {
  let timer = 0;
  return (/** @type {A} */ ...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...args), wait);
  };
}

/** @param {number} bytes */
export function readableBytes(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** @param {number} ms */
export function readableTime(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
