// The page: connects the form, the queue, the history and the display.

import { setKeyDialog, model, models, samplers } from "./api.js";
import { offerControl, setImage } from "./control.js";
import * as form from "./form.js";
import { offerGallery, setUpGallery } from "./gallery.js";
import { openHistory } from "./history.js";
import { offerMore, setUpMore } from "./more.js";
import { offerNetworks, setUpNetworks } from "./networks.js";
import { parseSettings, readPngText } from "./parameters.js";
import { setUpPlot, updatePlot } from "./plot.js";
import { setUpPrompts } from "./prompt.js";
import { createQueue, isActive, createItem } from "./queue.js";
import { createSelection } from "./selection.js";
import { describeState, focusTile, showDetail, showExamples, showModelLine, showTile, showTiles, showZoomed } from "./view.js";

const $ = (id) => document.getElementById(id);
const items = []; // newest first
let shown = null;
let offeredSamplers = [];
let loadedModel = ""; // the one whose details are shown
let pinned = false; // selected by the user: the page does not switch to the next image
const queue = createQueue(onChange);
const history = openHistory();
const selection = createSelection({ items, remove: removeAll, announce });

function show(item, byUser = false) {
  const before = shown;
  shown = item;
  pinned = byUser;
  showDetail(item);
  if (before) showTile(before, false);
  if (item) showTile(item, true);
}

function showAll() {
  const choose = (item, event) => selection.select(item, event) || show(item, true);
  showTiles(items, shown, { show: choose, cancel: queue.cancel });
  selection.show();
  showTitle();
}

function showTitle() {
  const active = items.find((item) => item.state === "running");
  document.title = active?.total ? `${Math.round((100 * active.step) / active.total)} % · sdrt` : "sdrt";
}

function generateAll(settings) {
  showMessage("");
  const created = settings.map(createItem);
  items.unshift(...created);
  if (!shown || !isActive(shown)) show(created[0]);
  queue.add(created);
  if (matchMedia("(max-width: 820px), (max-height: 480px)").matches) $("stage").scrollIntoView({ block: "start" });
  showAll();
  announce(created.length > 1 ? `${created.length} images requested` : "Image requested");
  return created;
}

/** Handles every event of every image in the queue. */
function onChange(item, what) {
  const moved = item.state !== item.before;
  if (moved && item.state === "running" && !pinned && !isActive(shown)) show(item);
  if (what === "completed") onFinished(item);
  if (what === "failed") showError(item.error.message);
  if (what === "cancelled") onCancelled(item);
  if (item === shown) showDetail(item);
  if (moved) showAll();
  else showTile(item, item === shown);
  updatePlot(item);
  if (item === shown) announceStep(item, what);
  if (what === "progress") showTitle();
  item.before = item.state;
}

async function onFinished({ id, settings, image, seconds }) {
  const old = await (await history).add({ id, settings, image, seconds }).catch(() => []);
  for (const item of items.filter(({ id }) => old?.includes(id))) removeItem(item);
  if (old?.length) showAll();
  if (!loadedModel) await showModel();
}

/** Removes a cancelled image; its settings are still in the form. */
function onCancelled(item) {
  const others = items.filter((other) => other !== item);
  const next = others.find(isActive) ?? others[0];
  removeItem(item);
  if (item === shown) show(next ?? null);
  announce("Cancelled");
}

function removeItem(item) {
  if (items.includes(item)) items.splice(items.indexOf(item), 1);
}

function cancelShown() {
  const item = isActive(shown ?? {}) ? shown : items.find((item) => item.state === "running") ?? items.find(isActive);
  if (item) queue.cancel(item);
  return Boolean(item);
}

async function remove(item) {
  const at = items.indexOf(item);
  removeItem(item);
  show(items[at] ?? items[at - 1] ?? null, true);
  showAll();
  if (shown) focusTile(shown);
  await (await history).remove([item.id]);
}

async function removeAll(removed) {
  removed.forEach(removeItem);
  if (removed.includes(shown)) show(items[0] ?? null, true);
  showAll();
  await (await history).remove(removed.map(({ id }) => id));
}

async function clear() {
  if (!confirm("Remove all finished images from this browser?")) return;
  for (const item of items.filter((item) => !isActive(item))) removeItem(item);
  show(items[0] ?? null);
  showAll();
  await (await history).clear();
}

/* messages */

function showError(text) {
  $("message").textContent = "";
  $("error").textContent = text;
}

function showMessage(text) {
  $("error").textContent = "";
  $("message").textContent = text;
}

function announce(text) {
  $("live").textContent = text;
}

/** Announces queue positions, quarters and the end to screen readers, not every step. */
function announceStep(item, what) {
  const quarter = Math.floor((4 * item.step) / (item.total || 1));
  const news = what !== "progress" || quarter !== item.quarter;
  item.quarter = quarter;
  if (what === "completed") announce("The image is finished");
  else if (news && what !== "partial_image" && isActive(item)) announce(describeState(item));
}

/* files */

async function receive(file) {
  if (!file) return;
  const text = await readPngText(file).catch(() => null);
  if (text !== null) return readSettings(text, file.name);
  if (file.type.startsWith("image/")) {
    form.setStart(file);
    return showMessage(`${file.name} has no settings; using it as the input image.`);
  }
  showError(`${file.name} has no settings.`);
}

/** Shows an image of the server's gallery next to those of this browser. */
function openStored(image, parameters) {
  const item = { ...createItem({ negative_prompt: "", ...parseSettings(parameters) }), state: "done", image };
  items.unshift(item);
  show(item, true);
  showAll();
}

async function readSettings(text, name) {
  await fill(parseSettings(text), `Settings read from ${name}.`);
}

async function useSettings(item) {
  await fill({ scheduler: "", start: null, ...item.settings, count: 1 }, "Settings restored.");
  $("prompt").focus();
}

/** Fills the form, the model first: it determines the sizes. */
async function fill(settings, message) {
  const before = form.chosenModel();
  form.chooseModel(settings.model);
  if (form.chosenModel() !== before) await showModel();
  const unavailable = form.fillForm(settings);
  showMessage(unavailable.length ? `${message} Not available on this server: ${unavailable.join(", ")}.` : message);
}

async function showModel() {
  try {
    const details = await model(form.chosenModel(), showMessage);
    loadedModel = details.loaded === false ? "" : details.id; // under a memory budget: on first use
    form.offerSizes(details.sizes, details.size_multiple);
    offerControl(details);
    offerMore(details, form.savedValue("hires_upscaler"));
    showModelLine(details);
    showExamples(details, choosePrompt);
    showMessage("");
    updateCounts();
    updateCost();
    await offerNetworks(details.id);
  } catch (error) {
    showError(error.message);
  }
}

function choosePrompt(prompt) {
  form.fillForm({ prompt });
  $("prompt").focus();
}

/* set-up */

function setUpActions() {
  $("model").addEventListener("change", showModel);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const settings = form.settingsFromForm(showError);
    if (settings) generateAll(settings);
  });
  const on = (id, action) => $(id).addEventListener("click", action);
  on("zoom-open", showZoomed);
  on("cancel", cancelShown);
  on("cancel-all", () => items.filter(isActive).forEach(queue.cancel));
  on("retry", () => {
    const { settings } = shown;
    remove(shown);
    generateAll([settings]);
  });
  on("restore", () => useSettings(shown));
  on("restart", () => {
    form.setStart(shown.image);
    showMessage("Using this image as the input image.");
    $("prompt").focus();
  });
  on("remove", () => remove(shown));
  on("clear", clear);
  on("key-cancel", () => $("key-dialog").close(""));
  on("reuse-seed", () => form.setSeed(shown.settings.seed));
  $("settings-file").addEventListener("change", (event) => {
    receive(event.target.files[0]);
    event.target.value = "";
  });
}

function setUpKeys() {
  const mac = /Mac|iPhone|iPad/.test(navigator.platform);
  if (mac) $("generate-keys").textContent = "⌘ ↩";
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      $("form").requestSubmit();
    }
    if (event.key === "Escape" && cancelShown()) event.preventDefault();
  });
  $("tiles").addEventListener("keydown", (event) => {
    const offset = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const ends = { Home: 0, End: items.length - 1 }[event.key];
    const next = items[offset ? items.indexOf(shown) + offset : ends];
    if (!next) return;
    event.preventDefault();
    show(next, true);
    focusTile(next);
  });
}

function setUpDrops() {
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    const place = file?.type.startsWith("image/") && event.target.closest(".picker")?.id;
    if (place === "start") form.setStart(file);
    else if (place) setImage(place, file);
    else receive(file);
  });
}

/** Asks the user for a key; resolves to it, or to null. */
function askKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue ? $("key").value : null), { once: true });
  });
}

async function load() {
  for (const record of await (await history).all()) items.push({ ...record, state: "done" });
  showAll();
  if (items.length && !shown) show(items[0]);
  try {
    form.offerModels(await models());
    offeredSamplers = await samplers();
    form.offerSamplers(offeredSamplers);
    await showModel();
    await offerGallery();
  } catch (error) {
    showError(error.message);
  }
}

setKeyDialog(askKey);
const updateCounts = setUpPrompts(() => loadedModel);
const updateCost = setUpMore(() => (loadedModel ? form.currentSettings() : null));
form.setUpForm();
setUpNetworks();
setUpGallery(openStored);
setUpPlot({
  read: () => form.settingsFromForm(showError)?.[0],
  samplers: () => offeredSamplers,
  generate: generateAll,
  show: (item) => show(item, true),
  cancel: queue.cancel,
  showError,
});
setUpActions();
setUpKeys();
setUpDrops();
load();
