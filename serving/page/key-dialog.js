/** Asks for the endpoint's key. */

import { byId } from "./dom.js";

/**
 * @param {boolean} wrong whether the key before was refused
 * @returns {Promise<string>} the key; empty if it is not given
 */
export function askKey(wrong) {
  const dialog = /** @type {HTMLDialogElement} */ (/** @type {unknown} */ (byId("key-dialog")));
  const input = /** @type {HTMLInputElement} */ (/** @type {unknown} */ (byId("key-input")));
  byId("key-title").textContent = wrong ? "That key was refused" : "This endpoint needs a key";
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const closed = () => {
      resolve(dialog.returnValue === "use" ? input.value.trim() : "");
      input.value = "";
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}
