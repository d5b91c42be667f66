// Displays images: the selected one large, and a tile for each. Changes only the page.

import { isActive } from "./queue.js";
import { setUpZoom } from "./zoom.js";

const $ = (id) => document.getElementById(id);
const SMALL = 256; // smaller images are enlarged with sharp pixels
const urls = new WeakMap(); // Blob → object URL
const tiles = new Map(); // item → {tile, image}

function objectUrl(image) {
  if (!urls.has(image)) urls.set(image, URL.createObjectURL(image));
  return urls.get(image);
}

/** Revokes the URL of a replaced preview or a removed image, once nothing loads it. */
function releaseUrl(image) {
  const url = urls.get(image);
  urls.delete(image);
  if (url) setTimeout(() => URL.revokeObjectURL(url), 1000);
}

export function describeState(item) {
  const { state, position, step, total, seconds } = item;
  if (state === "running" && total) return [`Step ${step} of ${total}`, timeLeft(item)].filter(Boolean).join(", ");
  return {
    waiting: "Waiting",
    queued: position ? `Queued behind ${position} more` : "Next in the queue",
    running: "Started",
    failed: "Generation failed",
    cancelled: "Cancelled",
    done: seconds ? `Generated in ${seconds} s` : "",
  }[state];
}

/** The remaining time, from the mean of the steps so far; nothing before there are two. */
function timeLeft({ step, total, firstStep, firstStepAt, stepAt }) {
  if (!(step > firstStep) || step >= total) return "";
  const seconds = ((stepAt - firstStepAt) / (step - firstStep) / 1000) * (total - step);
  return seconds < 60 ? `${Math.ceil(seconds)} s left` : `${Math.ceil(seconds / 60)} min left`;
}

/** Shows what the selected model is for, with example prompts; `choose(prompt)` is called on a click. */
export function showExamples({ description, prompt_examples: prompts = [] }, choose) {
  $("description").textContent = description ?? "";
  $("description").hidden = !description;
  $("examples").replaceChildren(...prompts.map((prompt) => exampleOf(prompt, choose)));
}

function exampleOf(prompt, choose) {
  const [entry, button] = [document.createElement("li"), document.createElement("button")];
  button.type = "button";
  button.textContent = prompt;
  button.addEventListener("click", () => choose(prompt));
  entry.append(button);
  return entry;
}

let resetZoom = null;

/** Shows the selected image as large as the window; a click or Escape closes it. */
export function showZoomed() {
  const image = $("image");
  Object.assign($("zoom-image"), { src: image.src, alt: image.alt, className: image.className });
  $("zoom-dialog").showModal();
  resetZoom ??= setUpZoom($("zoom-scroller"), { zoomIn: $("zoom-in"), zoomOut: $("zoom-out") });
  resetZoom();
}

/** Shows what a model runs on. */
export function showModelLine({ backend, precision }) {
  $("engine").textContent = [backend, precision].filter(Boolean).join(" · ");
}

export function settingsText(settings) {
  const { num_inference_steps, scheduler, guidance_scale, strength, seed, size, model } = settings;
  const { guidance_interval, guidance_rescale, clip_skip, hires_scale, hires_upscaler } = settings;
  const { feature_reuse, feature_reuse_order, output_reuse } = settings;
  const parts = [
    `${num_inference_steps} steps`,
    scheduler,
    `guidance ${guidance_scale}`,
    guidance_interval && `from ${guidance_interval.join(" to ")}`,
    guidance_rescale && `rescale ${guidance_rescale}`,
    feature_reuse && `feature reuse ${feature_reuse}${feature_reuse_order ? ", extrapolated" : ""}`,
    output_reuse && `output reuse ${output_reuse}`,
    clip_skip && `clip skip ${clip_skip}`,
    hires_scale && `hires × ${hires_scale} ${hires_upscaler}`,
    strength !== undefined && `strength ${strength}`,
    `seed ${seed}`,
    size?.replace("x", " × "),
    model,
  ];
  return parts.filter(Boolean).map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

/** Shows the selected item large, or the empty state for null. */
export function showDetail(item) {
  for (const [id, shown] of [["empty", !item], ["canvas", item], ["caption", item]]) $(id).hidden = !shown;
  $("reuse-seed").disabled = !item;
  if (!item) return;
  showImage(item);
  showProgress($("progress"), item);
  $("notice").textContent = item.image ? "" : (item.error?.message ?? describeState(item));
  $("caption-state").textContent = describeState(item);
  $("caption-prompt").textContent = item.settings.prompt;
  $("caption-settings").textContent = settingsText(item.settings);
  showActions(item);
}

function showImage(item) {
  const image = $("image");
  $("zoom-open").hidden = !item.image;
  image.alt = item.state === "done" ? item.settings.prompt : `Preview: ${item.settings.prompt}`;
  $("canvas").dataset.state = item.state;
  const [width, height] = (item.settings.size ?? "1x1").split("x").map(Number);
  $("canvas").style.setProperty("--ratio", width / height || 1);
  if (!item.image) return image.removeAttribute("src");
  image.onload = () => {
    const sharp = item.state === "done" && image.naturalWidth < SMALL;
    image.classList.toggle("sharp", sharp);
    $("canvas").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  };
  if (image.src !== objectUrl(item.image)) image.src = objectUrl(item.image);
}

function showProgress(bar, item) {
  bar.hidden = !isActive(item);
  bar.value = item.total ? item.step / item.total : 0;
}

function showActions(item) {
  const done = item.state === "done";
  $("cancel").hidden = !isActive(item);
  $("retry").hidden = isActive(item) || done;
  for (const id of ["download", "restart"]) $(id).hidden = !done;
  $("remove").hidden = isActive(item);
  if (!done) return;
  $("download").href = objectUrl(item.image);
  $("download").download = fileName(item);
}

/** A file name of words of the prompt and the seed. */
export function fileName({ settings, image }) {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const ending = image.type.split("/")[1] ?? "png";
  return `${[...words.slice(0, 8), settings.seed].join("-")}.${ending}`;
}

/** Shows a tile for each item, in order. `actions`: {show(item, event), cancel(item)}. */
export function showTiles(items, shown, actions) {
  $("gallery").hidden = !items.length;
  for (const item of tiles.keys()) if (!items.includes(item)) removeTile(item);
  items.forEach((item, i) => {
    if (!tiles.has(item)) tiles.set(item, { tile: newTile(item, actions), image: null });
    const { tile } = tiles.get(item);
    if ($("tiles").children[i] !== tile) $("tiles").insertBefore(tile, $("tiles").children[i] ?? null);
    showTile(item, item === shown);
  });
  const active = items.filter(isActive).length;
  $("queue-count").textContent = active ? `${active} in progress` : "";
  $("cancel-all").hidden = active < 2;
  $("clear").hidden = !items.some((item) => !isActive(item));
}

function removeTile(item) {
  const { tile, image } = tiles.get(item);
  tile.remove();
  tiles.delete(item);
  releaseUrl(image);
}

function newTile(item, actions) {
  const tile = document.createElement("li");
  const button = document.createElement("button");
  const cancel = document.createElement("button");
  button.type = cancel.type = "button";
  button.className = "tile";
  button.append(document.createElement("img"), document.createElement("progress"));
  button.addEventListener("click", (event) => actions.show(item, event));
  cancel.className = "cancel-tile";
  cancel.textContent = "×";
  cancel.addEventListener("click", () => actions.cancel(item));
  tile.append(button, cancel);
  return tile;
}

/** Updates the tile of one item. */
export function showTile(item, shown) {
  const entry = tiles.get(item);
  if (!entry) return;
  const { tile, image } = entry;
  const [button, cancel] = tile.children;
  const [thumbnail, bar] = button.children;
  tile.dataset.state = item.state;
  button.tabIndex = shown ? 0 : -1; // one tab stop; arrow keys move between tiles
  button.setAttribute("aria-current", shown);
  button.setAttribute("aria-label", [item.settings.prompt, describeState(item)].filter(Boolean).join(". "));
  thumbnail.alt = "";
  thumbnail.hidden = !item.image;
  thumbnail.loading = "lazy";
  if (item.image && item.image !== image) {
    thumbnail.src = objectUrl(item.image);
    entry.image = item.image;
    releaseUrl(image);
  }
  bar.setAttribute("aria-hidden", "true");
  showProgress(bar, item);
  cancel.hidden = !isActive(item);
  cancel.setAttribute("aria-label", `Cancel: ${item.settings.prompt}`);
}

/** The button of an item's tile. */
export const tileOf = (item) => tiles.get(item)?.tile.firstChild;

export function focusTile(item) {
  tileOf(item)?.focus();
}
