/** Where pictures come from: samples, files, drops, the clipboard. */

import { byId, make } from "./dom.js";

/**
 * @typedef {object} Picture
 * @property {number} id
 * @property {string} name of its file
 * @property {Blob} blob
 * @property {string} url of the blob, for showing
 * @property {string} sample its name among the samples; empty for people's own
 */

const SAMPLES = [
  { name: "still-life", title: "Still life" },
  { name: "valley", title: "Valley" },
  { name: "fields", title: "Fields" },
  { name: "cells", title: "Blood cells" },
];

let count = 0;

/**
 * @param {Blob} blob
 * @param {string} name
 * @param {string} [sample]
 * @returns {Picture}
 */
function pictureOf(blob, name, sample = "") {
  return { id: ++count, name, blob, url: URL.createObjectURL(blob), sample };
}

/**
 * Watches everything a picture can come from.
 * @param {(picture: Picture) => void} onPicture
 * @param {(message: string) => void} onRefused
 * @returns {(picture: Picture) => void} shows which one is on show
 */
export function bindPictures(onPicture, onRefused) {
  const take = (/** @type {Iterable<File>} */ files) => {
    const [file, more] = [...files];
    if (!file) return;
    if (file.type && !file.type.startsWith("image/")) {
      onRefused(`${file.name} is not a picture. Choose a JPEG, PNG or WebP.`);
    } else {
      onPicture(pictureOf(file, file.name || "picture.png"));
      if (more) onRefused("One picture at a time: the first was taken.");
    }
  };
  bindSamples(onPicture, onRefused);
  const input = byId("file");
  input.addEventListener("change", () => {
    take(input.files);
    input.value = ""; // so that the same file can be chosen again
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) take(files);
  });
  bindDrops(take);
  return (picture) => {
    for (const button of document.querySelectorAll("[data-sample]")) {
      button.setAttribute("aria-pressed", String(button.dataset.sample === picture.sample));
    }
  };
}

/**
 * @param {(picture: Picture) => void} onPicture
 * @param {(message: string) => void} onRefused
 */
function bindSamples(onPicture, onRefused) {
  /** @type {Map<string, Picture>} the same picture each time, so that what is known of it is kept */
  const known = new Map();
  const choose = async (/** @type {string} */ name) => {
    const file = `${name}.jpg`;
    let picture = known.get(name);
    if (!picture) {
      const response = await fetch(`/page/samples/${file}`).catch(() => null);
      if (!response?.ok) return onRefused("The sample did not come. Is the server still running?");
      picture = pictureOf(await response.blob(), file, name);
      known.set(name, picture);
    }
    onPicture(picture);
  };
  for (const place of document.querySelectorAll("[data-samples]")) {
    for (const { name, title } of SAMPLES) {
      const image = make("img", { src: `/page/samples/${name}.jpg`, alt: "", width: 640, height: 480 });
      place.append(
        make(
          "button",
          { type: "button", class: "sample", title, dataset: { sample: name }, "aria-pressed": "false", on: { click: () => choose(name) } },
          image, make("span", { text: title }),
        ),
      );
    }
  }
}

/** @param {(files: Iterable<File>) => void} take */
function bindDrops(take) {
  const veil = byId("drop");
  const holdsFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    veil.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) veil.hidden = true;
  });
  addEventListener("drop", (event) => {
    veil.hidden = true;
    if (!holdsFiles(event)) return;
    event.preventDefault();
    take(event.dataTransfer?.files ?? []);
  });
}
