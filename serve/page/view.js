// What is seen of the pictures: the large one, and a tile for each. Changes nothing but the page.

import { inFlight } from "./queue.js";

const $ = (id) => document.getElementById(id);
const SMALL = 256; // pictures below are enlarged with their pixels sharp
const urls = new WeakMap(); // of pictures
const tiles = new Map(); // of items: {tile, picture}

function urlOf(picture) {
  if (!urls.has(picture)) urls.set(picture, URL.createObjectURL(picture));
  return urls.get(picture);
}

/** Let go of a preview that was replaced, or a picture that was removed, once nothing loads it. */
function forget(picture) {
  const url = urls.get(picture);
  urls.delete(picture);
  if (url) setTimeout(() => URL.revokeObjectURL(url), 1000);
}

export function stateOf(item) {
  const { state, position, step, total, seconds } = item;
  if (state === "running" && total) return `Step ${step} of ${total}`;
  return {
    waiting: "Waiting for its turn",
    queued: position ? `Waiting behind ${position} more` : "Next in the queue",
    running: "Begun",
    failed: "This picture was not made",
    cancelled: "Cancelled",
    done: seconds ? `Made in ${seconds} s` : "",
  }[state];
}

export function settingsText({ num_inference_steps, scheduler, guidance_scale, strength, seed, size, model }) {
  const parts = [
    `${num_inference_steps} steps`,
    scheduler,
    `guidance ${guidance_scale}`,
    strength !== undefined && `strength ${strength}`,
    `seed ${seed}`,
    size?.replace("x", " × "),
    model,
  ];
  return parts.filter(Boolean).map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

/** Show an item large, or the invitation if there is none. */
export function showLarge(item) {
  for (const [id, shown] of [["empty", !item], ["canvas", item], ["caption", item]]) $(id).hidden = !shown;
  $("reuse").disabled = !item;
  if (!item) return;
  showPicture(item);
  showBar($("bar"), item);
  $("notice").textContent = item.picture ? "" : (item.error?.message ?? stateOf(item));
  $("caption-state").textContent = stateOf(item);
  $("caption-prompt").textContent = item.settings.prompt;
  $("caption-settings").textContent = settingsText(item.settings);
  showActions(item);
}

function showPicture(item) {
  const image = $("picture");
  image.hidden = !item.picture;
  image.alt = item.state === "done" ? item.settings.prompt : `Preview: ${item.settings.prompt}`;
  $("canvas").dataset.state = item.state;
  const [width, height] = (item.settings.size ?? "1x1").split("x").map(Number);
  $("canvas").style.setProperty("--ratio", width / height || 1);
  if (!item.picture) return image.removeAttribute("src");
  image.onload = () => {
    const sharp = item.state === "done" && image.naturalWidth < SMALL;
    image.classList.toggle("sharp", sharp);
    $("canvas").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  };
  if (image.src !== urlOf(item.picture)) image.src = urlOf(item.picture);
}

function showBar(bar, item) {
  bar.hidden = !inFlight(item);
  bar.value = item.total ? item.step / item.total : 0;
}

function showActions(item) {
  const done = item.state === "done";
  $("cancel").hidden = !inFlight(item);
  $("retry").hidden = inFlight(item) || done;
  for (const id of ["download", "restart"]) $(id).hidden = !done;
  $("remove").hidden = inFlight(item);
  if (!done) return;
  $("download").href = urlOf(item.picture);
  $("download").download = fileName(item);
}

function fileName({ settings, picture }) {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const ending = picture.type.split("/")[1] ?? "png";
  return `${[...words.slice(0, 8), settings.seed].join("-")}.${ending}`;
}

/** All tiles, in the order of the items. `act` has show(item) and cancel(item). */
export function showTiles(items, shown, act) {
  $("strip").hidden = !items.length;
  for (const item of tiles.keys()) if (!items.includes(item)) removeTile(item);
  items.forEach((item, i) => {
    if (!tiles.has(item)) tiles.set(item, { tile: newTile(item, act), picture: null });
    const { tile } = tiles.get(item);
    if ($("tiles").children[i] !== tile) $("tiles").insertBefore(tile, $("tiles").children[i] ?? null);
    showTile(item, item === shown);
  });
  const active = items.filter(inFlight).length;
  $("counts").textContent = active ? `${active} being made` : "";
  $("cancel-all").hidden = active < 2;
  $("clear").hidden = !items.some((item) => !inFlight(item));
}

function removeTile(item) {
  const { tile, picture } = tiles.get(item);
  tile.remove();
  tiles.delete(item);
  forget(picture);
}

function newTile(item, act) {
  const tile = document.createElement("li");
  const button = document.createElement("button");
  const cancel = document.createElement("button");
  button.type = cancel.type = "button";
  button.className = "tile";
  button.append(document.createElement("img"), document.createElement("progress"));
  button.addEventListener("click", () => act.show(item));
  cancel.className = "stop";
  cancel.textContent = "×";
  cancel.addEventListener("click", () => act.cancel(item));
  tile.append(button, cancel);
  return tile;
}

/** Bring one item's tile up to date. */
export function showTile(item, shown) {
  const entry = tiles.get(item);
  if (!entry) return;
  const { tile, picture } = entry;
  const [button, cancel] = tile.children;
  const [image, bar] = button.children;
  tile.dataset.state = item.state;
  button.tabIndex = shown ? 0 : -1; // one tab stop; arrow keys move on
  button.setAttribute("aria-current", shown);
  button.setAttribute("aria-label", [item.settings.prompt, stateOf(item)].filter(Boolean).join(". "));
  image.alt = "";
  image.hidden = !item.picture;
  image.loading = "lazy";
  if (item.picture && item.picture !== picture) {
    image.src = urlOf(item.picture);
    entry.picture = item.picture;
    forget(picture);
  }
  bar.setAttribute("aria-hidden", "true");
  showBar(bar, item);
  cancel.hidden = !inFlight(item);
  cancel.setAttribute("aria-label", `Cancel: ${item.settings.prompt}`);
}

export function focusTile(item) {
  tiles.get(item)?.tile.firstChild.focus();
}
