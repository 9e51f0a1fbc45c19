/** The request on show, as code that people can run. */

import { featuresUrl } from "./query.js";

/**
 * @typedef {object} Shown
 * @property {string} origin of the endpoint
 * @property {import("./query.js").Wanted} wanted
 * @property {string} file name of the picture
 * @property {string} type of it
 * @property {boolean} isSample whether the endpoint has the picture itself
 * @property {boolean} needsKey
 */

/** Formats that features can be downloaded in. */
export const FORMATS = {
  npz: "application/x-npz",
  npy: "application/x-npy",
  safetensors: "application/vnd.safetensors",
};

/** @type {{id: string, label: string, write: (shown: Shown) => string}[]} */
export const SNIPPETS = [
  { id: "curl", label: "curl", write: curl },
  { id: "python", label: "Python", write: python },
  { id: "triton", label: "tritonclient", write: triton },
];

/** @param {Shown} shown */
export function curl({ origin, wanted, file, type, isSample, needsKey }) {
  const lines = [
    `curl --fail-with-body ${shell(origin + featuresUrl(wanted))}`,
    ...(needsKey ? [`-H "Authorization: Bearer $MIMRAY_API_KEY"`] : []),
    `-H ${shell(`Content-Type: ${type || "application/octet-stream"}`)}`,
    `-H ${shell(`Accept: ${FORMATS.npz}`)}`,
    `--data-binary ${shell(`@${file}`)}`,
    "-o features.npz",
  ];
  const first = isSample ? `curl -O ${shell(`${origin}/page/samples/${file}`)}\n` : "";
  return first + lines.join(" \\\n  ");
}

/** @param {Shown} shown */
export function python({ origin, wanted, file, needsKey }) {
  const options = [
    quoted(file),
    quoted(wanted.model),
    `layers=[${wanted.layer}]`,
    ...(wanted.norm ? [] : ["norm=False"]),
    ...(wanted.size ? [`size=${sizeValue(wanted.size)}`] : []),
    ...(wanted.dtype === "float32" ? [] : [`dtype=${quoted(wanted.dtype)}`]),
  ];
  return [
    "from mimray.serving.client import FeatureClient",
    "",
    ...(needsKey ? ["# The key is read from MIMRAY_API_KEY."] : []),
    `with FeatureClient(${quoted(origin)}) as client:`,
    `    features = client.features(${options.join(", ")})`,
    "",
    `print(features.layers[${wanted.layer}].shape, features.grid, features.stride)`,
  ].join("\n");
}

/** @param {Shown} shown */
export function triton({ origin, wanted, file, needsKey }) {
  const { protocol, host } = new URL(origin);
  const options = [
    ...(wanted.norm ? [] : [`"norm": False`]),
    ...(wanted.size ? [`"size": ${quoted(wanted.size)}`] : []),
    ...(wanted.dtype === "float32" ? [] : [`"dtype": ${quoted(wanted.dtype)}`]),
  ];
  const secure = protocol === "https:" ? ", ssl=True" : "";
  const name = quoted(`layer_${wanted.layer}`);
  return [
    ...(needsKey ? ["import os", ""] : []),
    "import numpy as np",
    "import tritonclient.http as http",
    "",
    `client = http.InferenceServerClient(${quoted(host)}${secure})`,
    `picture = http.InferInput("image", [1], "BYTES")`,
    `picture.set_data_from_numpy(np.array([open(${quoted(file)}, "rb").read()], dtype=object))`,
    "result = client.infer(",
    `    ${quoted(wanted.model)},`,
    "    [picture],",
    `    outputs=[http.InferRequestedOutput(${name})],`,
    ...(options.length ? [`    parameters={${options.join(", ")}},`] : []),
    ...(needsKey ? [`    headers={"Authorization": "Bearer " + os.environ["MIMRAY_API_KEY"]},`] : []),
    ")",
    `print(result.as_numpy(${name}).shape)`,
  ].join("\n");
}

/**
 * A word that a shell takes as it is.
 * @param {string} text
 */
function shell(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/**
 * A string literal of Python; JSON's are.
 * @param {string} text
 */
function quoted(text) {
  return JSON.stringify(text);
}

/** @param {string} size */
function sizeValue(size) {
  return /^\d+$/.test(size) ? size : quoted(size);
}
