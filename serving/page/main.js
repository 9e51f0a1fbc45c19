/** Puts the page together: what is chosen, who shows it. */

import { Api } from "./api.js";
import { Controls, layerOf } from "./controls.js";
import { announce, byId, debounced, make } from "./dom.js";
import { FindingsCard } from "./findings.js";
import { Inspector } from "./inspector.js";
import { askKey } from "./key-dialog.js";
import { ModelView } from "./model-view.js";
import { PatchPanel } from "./panel.js";
import { bindPictures } from "./pictures.js";
import { ReconstructionCard } from "./reconstruction.js";
import { RequestCard } from "./request.js";
import { Source } from "./source.js";
import { Store } from "./state.js";
import { bindTheme } from "./theme.js";

const MODELS_AGAIN_MS = 5000;
/** Changes of these ask the endpoint again. */
const ASKING = ["model", "layer", "other", "otherLayer", "norm", "size", "dtype"];

/** @type {Record<string, any>[]} */
let models = [];
/** @type {import("./pictures.js").Picture | null} */
let picture = null;
/** @type {ModelView[]} */
const views = [];

const api = new Api(async (wrong) => {
  const key = await askKey(wrong);
  if (key) setTimeout(showKey);
  return key;
});
const source = new Source(api);
const store = new Store(changed);
const controls = new Controls((changes) => store.set(changes));
const inspector = new Inspector(choose);
const request = new RequestCard(api, (dtype) => store.set({ dtype }));
const findings = new FindingsCard(api);
const reconstruction = new ReconstructionCard(api);
const original = new PatchPanel({ title: "Picture", onPoint: point, onChoose: choose });
const showPicture = bindPictures(take, notice);
const refreshSoon = debounced(refresh, 90);

/** @param {Set<string>} names of what changed in the state */
function changed(names) {
  settle();
  controls.show(store.state, models);
  display();
  if (names.has("at") || names.has("centred")) chooseEverywhere();
  if (ASKING.some((name) => names.has(name))) refreshSoon();
}

/** @param {{u: number, v: number}} place */
function choose({ u, v }) {
  // Rounded as the URL has it, so that a link shows the very same.
  store.set({ at: [Math.round(u * 1000) / 1000, Math.round(v * 1000) / 1000] });
  const described = views.filter((view) => view.map).map((view) => `${view.label}: ${view.legend.summary}`);
  announce(`Patch ${byId("patch-name").textContent} chosen. ${described.join(". ")}`);
}

/** @param {{u: number, v: number} | null} place */
function point(place) {
  original.point(place);
  for (const view of views) view.point(place);
}

function chooseEverywhere() {
  const { at, centred } = store.state;
  original.choose(...at);
  for (const view of views) view.choose(...at, centred);
  inspector.show(original.picture, store.state.at, views);
}

/** @param {ModelView} view whose map is new */
function mapped(view) {
  const first = views.find(({ map }) => map);
  if (first?.map) original.setGrid(first.map.grid);
  if (view.map) notice("");
  chooseEverywhere();
  const { source: size } = first?.map?.grid ?? {};
  byId("source-facts").textContent = size ? `${size[0]} × ${size[1]} pixels` : "";
}

/** @param {import("./pictures.js").Picture} chosen */
async function take(chosen) {
  picture = chosen;
  notice("");
  showPicture(chosen);
  const welcome = byId("welcome");
  const wasThere = welcome.contains(document.activeElement);
  delete document.body.dataset.empty;
  welcome.hidden = true;
  byId("stage").hidden = false;
  // The button that was pressed is gone; the keys go to the patches.
  if (wasThere) original.frame.focus({ preventScroll: true });
  byId("source-title").textContent = chosen.name;
  original.setPicture(chosen.url);
  refresh();
  const image = original.picture;
  await image.decode().catch(() => {});
  if (picture !== chosen) return;
  if (image.naturalWidth) original.setRatio(image.naturalWidth / image.naturalHeight);
  chooseEverywhere();
}

/** What each column asks for. */
function wanted() {
  const { state } = store;
  const { norm, size, dtype } = state;
  const chosen = [
    { id: state.model, layer: state.layer },
    { id: state.other, layer: state.otherLayer },
  ];
  return chosen.flatMap(({ id, layer }) => {
    const model = models.find((one) => one.id === id && one.ready);
    return model ? [{ model, wanted: { model: id, layer: layerOf(model, layer), norm, size, dtype } }] : [];
  });
}

function refresh() {
  const columns = wanted();
  if (!picture || columns.length === 0) return;
  while (views.length > columns.length) views.pop()?.close();
  while (views.length < columns.length) {
    const view = new ModelView(source, { onPoint: point, onChoose: choose, onMap: mapped });
    views.push(view);
    byId("models").append(view.element);
  }
  byId("stage").dataset.columns = String(columns.length);
  columns.forEach((column, i) => views[i].show(/** @type {any} */ (picture), column.wanted, column.model.version));
  request.show(picture, columns.map(({ wanted: one }) => ({ label: `${one.model}, layer ${one.layer}`, wanted: one })));
  findings.show(picture, columns.find(({ model }) => Object.keys(model.heads ?? {}).length)?.model.id ?? "");
  reconstruction.show(picture, columns.find(({ model }) => model.can_reconstruct)?.model.id ?? "");
  display();
}

function display() {
  const { smooth, over } = store.state;
  byId("stage").classList.toggle("smooth", smooth);
  byId("stage").classList.toggle("over", over);
}

/** @param {string} text what is wrong; empty for nothing */
function notice(text) {
  const place = byId("notice");
  place.hidden = !text;
  place.textContent = text;
}

/** Makes the state name models that there are. */
function settle() {
  if (models.length === 0) return;
  const { model, layer, other } = store.state;
  const known = (/** @type {string} */ name) => models.some(({ id }) => id === name);
  if (!known(model)) {
    const { id } = models.find(({ ready }) => ready) ?? models[0];
    // A layer that came with another model's name means nothing here.
    store.set({ model: id, layer: model ? null : layer });
  }
  if (other && !known(other)) store.set({ other: "", otherLayer: null });
}

function showKey() {
  byId("key").hidden = !api.key;
}

async function loadModels() {
  try {
    models = await api.models();
  } catch (error) {
    const { message, advice = "" } = /** @type {Error & {advice?: string}} */ (error);
    const again = make("button", { type: "button", class: "button", text: "Try again", on: { click: loadModels } });
    notice(" ");
    byId("notice").replaceChildren(make("p", { text: `${message} ${advice}` }), again);
    return;
  }
  if (models.length === 0) return notice("No model is served here yet: mimray serve NAME@alias.");
  notice("");
  settle();
  controls.show(store.state, models);
  if (views.length < wanted().length) refresh();
  if (models.some(({ ready }) => !ready)) setTimeout(loadModels, MODELS_AGAIN_MS);
}

// On a phone the pictures come first.
if (matchMedia("(max-width: 860px)").matches) byId("settings").open = false;
bindTheme(/** @type {any} */ (byId("theme")));
byId("source").append(original.element);
byId("key").addEventListener("click", () => {
  api.key = "";
  showKey();
  announce("The key is forgotten.");
});
showKey();
display();
loadModels();
