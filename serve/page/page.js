// The page: joins the form, the queue, the history and what is shown.

import { askForKeysWith, model, models, samplers } from "./api.js";
import * as form from "./form.js";
import { openHistory } from "./history.js";
import { settingsFromText, textFromPng } from "./parameters.js";
import { createQueue, inFlight, itemFrom } from "./queue.js";
import { focusTile, showLarge, showTile, showTiles, stateOf } from "./view.js";

const $ = (id) => document.getElementById(id);
const items = []; // the newest first
let shown = null;
let picked = false; // by hand: the page does not move on by itself
const queue = createQueue(changed);
const kept = openHistory();

function show(item, byHand = false) {
  const before = shown;
  shown = item;
  picked = byHand;
  showLarge(item);
  if (before) showTile(before, false);
  if (item) showTile(item, true);
}

function showAll() {
  showTiles(items, shown, { show: (item) => show(item, true), cancel: queue.cancel });
  showTitle();
}

function showTitle() {
  const active = items.find((item) => item.state === "running");
  document.title = active?.total ? `${Math.round((100 * active.step) / active.total)} % · sdrt` : "sdrt";
}

function make(settings) {
  say("");
  const made = settings.map(itemFrom);
  items.unshift(...made);
  if (!shown || !inFlight(shown)) show(made[0]);
  queue.add(made);
  if (matchMedia("(max-width: 820px), (max-height: 480px)").matches) $("stage").scrollIntoView({ block: "start" });
  showAll();
  announce(made.length > 1 ? `${made.length} pictures asked for` : "Asked for");
}

/** Hears of every event of every picture being made. */
function changed(item, what) {
  const moved = item.state !== item.before;
  if (moved && item.state === "running" && !picked && !inFlight(shown)) show(item);
  if (what === "completed") finished(item);
  if (what === "failed") complain(item.error.message);
  if (what === "cancelled") gone(item);
  if (item === shown) showLarge(item);
  if (moved) showAll();
  else showTile(item, item === shown);
  if (item === shown) announceStep(item, what);
  if (what === "progress") showTitle();
  item.before = item.state;
}

async function finished({ id, settings, picture, seconds }) {
  const old = await (await kept).keep({ id, settings, picture, seconds }).catch(() => []);
  for (const each of items.filter((item) => old?.includes(item.id))) take(each);
  if (old?.length) showAll();
}

/** A cancelled picture leaves nothing; its settings are still in the form. */
function gone(item) {
  const next = items.find((each) => each !== item && inFlight(each)) ?? items.find((each) => each !== item);
  take(item);
  if (item === shown) show(next ?? null);
  announce("Cancelled");
}

function take(item) {
  if (items.includes(item)) items.splice(items.indexOf(item), 1);
}

function cancelShown() {
  const item = inFlight(shown ?? {}) ? shown : items.find((each) => each.state === "running") ?? items.find(inFlight);
  if (item) queue.cancel(item);
  return Boolean(item);
}

async function remove(item) {
  const at = items.indexOf(item);
  take(item);
  show(items[at] ?? items[at - 1] ?? null, true);
  showAll();
  if (shown) focusTile(shown);
  await (await kept).drop(item.id);
}

async function clear() {
  if (!confirm("Remove all finished pictures from this browser?")) return;
  for (const item of items.filter((each) => !inFlight(each))) take(item);
  show(items[0] ?? null);
  showAll();
  await (await kept).clear();
}

/* words */

function complain(text) {
  $("message").textContent = "";
  $("error").textContent = text;
}

function say(text) {
  $("error").textContent = "";
  $("message").textContent = text;
}

function announce(text) {
  $("live").textContent = text;
}

/** To screen readers only what is worth hearing: places, the quarters, the end. */
function announceStep(item, what) {
  const quarter = Math.floor((4 * item.step) / (item.total || 1));
  const news = what !== "progress" || quarter !== item.quarter;
  item.quarter = quarter;
  if (what === "completed") announce("The picture is finished");
  else if (news && what !== "partial_image" && inFlight(item)) announce(stateOf(item));
}

/* pictures from outside */

async function receive(file) {
  if (!file) return;
  const text = await textFromPng(file).catch(() => null);
  if (text !== null) return readSettings(text, file.name);
  if (file.type.startsWith("image/")) {
    form.setStart(file);
    return say(`${file.name} carries no settings; it is the picture to start from.`);
  }
  complain(`${file.name} carries no settings.`);
}

async function readSettings(text, name) {
  await fill(settingsFromText(text), `Settings read from ${name}.`);
}

async function useSettings(item) {
  await fill({ scheduler: "", start: null, ...item.settings, count: 1 }, "Settings restored.");
  $("prompt").focus();
}

/** Fill the form, the model first: it decides which sizes there are. */
async function fill(settings, done) {
  const before = form.chosenModel();
  form.chooseModel(settings.model);
  if (form.chosenModel() !== before) await showModel();
  const missing = form.fillForm(settings);
  say(missing.length ? `${done} This server has no ${missing.join(", no ")}: left as it was.` : done);
}

async function showModel() {
  try {
    form.offerSizes((await model(form.chosenModel(), say)).sizes);
    say("");
  } catch (error) {
    complain(error.message);
  }
}

/* setting up */

function setUpActions() {
  $("model").addEventListener("change", showModel);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const settings = form.settingsFromForm(complain);
    if (settings) make(settings);
  });
  const on = (id, action) => $(id).addEventListener("click", action);
  on("cancel", cancelShown);
  on("cancel-all", () => items.filter(inFlight).forEach(queue.cancel));
  on("retry", () => {
    const { settings } = shown;
    remove(shown);
    make([settings]);
  });
  on("restore", () => useSettings(shown));
  on("restart", () => {
    form.setStart(shown.picture);
    say("The next picture starts from this one.");
    $("prompt").focus();
  });
  on("remove", () => remove(shown));
  on("clear", clear);
  on("key-cancel", () => $("key-dialog").close(""));
  on("reuse", () => form.setSeed(shown.settings.seed));
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
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const ends = { Home: 0, End: items.length - 1 }[event.key];
    const next = items[step ? items.indexOf(shown) + step : ends];
    if (!next) return;
    event.preventDefault();
    show(next, true);
    focusTile(next);
  });
}

function setUpDrops() {
  const over = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragover", (event) => {
    if (!over(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    if (!over(event)) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (event.target.closest("#start") && file?.type.startsWith("image/")) form.setStart(file);
    else receive(file);
  });
}

/** The key from the user, or null; one dialog for all requests that wait for it. */
function askKey(why) {
  const dialog = $("key-dialog");
  $("key-why").textContent = why;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue ? $("key").value : null), { once: true });
  });
}

async function load() {
  for (const record of await (await kept).all()) items.push({ ...record, state: "done" });
  showAll();
  if (items.length && !shown) show(items[0]);
  try {
    form.offerModels(await models());
    form.offerSamplers(await samplers());
    await showModel();
  } catch (error) {
    complain(error.message);
  }
}

askForKeysWith(askKey);
form.setUpForm();
setUpActions();
setUpKeys();
setUpDrops();
load();
