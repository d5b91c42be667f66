// The dialog of LoRAs and embeddings. Knows their names and thumbnails; what is in the prompt, prompt.js.

import { extraNetworks, thumbnail } from "./api.js";
import { hasLora, insertWord, toggleLora } from "./prompt.js";

const $ = (id) => document.getElementById(id);
const KINDS = { loras: "LoRA", embeddings: "Embedding" };

export function setUpNetworks() {
  $("networks-open").addEventListener("click", () => {
    $("networks-search").value = "";
    search();
    showPressed();
    $("networks-dialog").showModal();
    loadThumbnails();
  });
  $("networks-search").addEventListener("input", search);
}

/** Lists what a model's prompts can name; without anything the button is hidden. */
export async function offerNetworks(model) {
  const networks = await extraNetworks(model);
  const cards = Object.keys(KINDS).flatMap((kind) => networks[kind].map((network) => createCard(kind, network)));
  $("networks").replaceChildren(...cards);
  $("networks-open").hidden = !cards.length;
}

function createCard(kind, { name, alias, has_thumbnail }) {
  const [entry, button, image, label, type] = ["li", "button", "img", "span", "span"].map((tag) =>
    document.createElement(tag),
  );
  Object.assign(entry.dataset, { kind, name, words: `${name} ${alias ?? ""}`.toLowerCase() });
  if (has_thumbnail) entry.dataset.thumbnail = "waiting";
  Object.assign(button, { type: "button", className: "card" });
  Object.assign(image, { alt: "", hidden: true });
  label.textContent = name;
  Object.assign(type, { textContent: KINDS[kind], className: "muted" });
  button.append(image, label, type);
  button.addEventListener("click", () => {
    if (kind === "loras") toggleLora(name);
    else insertWord(name);
    showPressed();
    button.focus();
    $("networks-state").textContent = kind === "loras" && !hasLora(name) ? `${name} removed` : `${name} inserted`;
  });
  entry.append(button);
  return entry;
}

function showPressed() {
  $("networks-state").textContent = "";
  for (const entry of $("networks").children) {
    if (entry.dataset.kind === "loras") entry.firstChild.setAttribute("aria-pressed", hasLora(entry.dataset.name));
  }
}

function search() {
  const words = $("networks-search").value.toLowerCase().split(/\s+/);
  for (const entry of $("networks").children) entry.hidden = !words.every((word) => entry.dataset.words.includes(word));
}

/** Loads the thumbnails, one after another, when the dialog is first opened. */
async function loadThumbnails() {
  for (const entry of $("networks").querySelectorAll("[data-thumbnail=waiting]")) {
    entry.dataset.thumbnail = "loaded";
    const blob = await thumbnail(entry.dataset.kind, entry.dataset.name).catch(() => null);
    const image = entry.querySelector("img");
    if (blob) Object.assign(image, { src: URL.createObjectURL(blob), hidden: false });
  }
}
