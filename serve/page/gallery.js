// The dialog of the images that the server stores. Knows their list; what is shown of one, the page.

import { deleteStored, listStored, storedFile } from "./api.js";

const $ = (id) => document.getElementById(id);
const DELAY = 300; // ms after the last change
const LIMIT = 48; // images of one request
const STREAMS = 2; // of thumbnails; images that are generated have four of a browser's six

let asked = 0; // so that an answer to an earlier search is not shown
let last = null; // the id that the list ends with

/** `open(file, parameters)` shows an image on the page. */
export function setUpGallery(open) {
  let timer = null;
  $("stored-open").addEventListener("click", () => {
    $("stored-search").value = "";
    $("stored-dialog").showModal();
    list(open);
  });
  $("stored-search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => list(open), DELAY);
  });
  $("stored-more").addEventListener("click", () => list(open, last));
}

/** Shows the button if the server has a gallery. */
export async function offerGallery() {
  $("stored-open").hidden = !(await listStored({ limit: 1 })).enabled;
}

async function list(open, before = null) {
  const number = ++asked;
  const query = { limit: LIMIT, q: $("stored-search").value, ...(before && { before }) };
  const answer = await listStored(query).catch((error) => ({ error }));
  if (number !== asked) return;
  const { error, data = [], has_more = false } = answer;
  $("stored-state").textContent = error?.message ?? (data.length || before ? "" : "No images");
  if (!before) clearList();
  last = data.at(-1)?.id ?? last;
  $("stored-more").hidden = !has_more;
  const cards = data.map((image) => createCard(image, open));
  $("stored").append(...cards);
  if (before) cards[0]?.firstChild.focus();
  const waiting = cards.map((card, i) => [card, data[i]]);
  const loadNext = async () => {
    while (waiting.length) await loadThumbnail(...waiting.shift(), () => number === asked);
  };
  await Promise.all(Array.from({ length: STREAMS }, loadNext));
}

function clearList() {
  for (const image of $("stored").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("stored").replaceChildren();
}

function createCard({ id, url, parameters }, open) {
  const [entry, button, image, remove] = ["li", "button", "img", "button"].map((tag) => document.createElement(tag));
  const prompt = parameters.split("\n")[0];
  Object.assign(button, { type: "button", className: "tile" });
  button.setAttribute("aria-label", `${prompt || "Image"}, ${id.split("/")[0]}`);
  button.title = prompt;
  Object.assign(image, { alt: "", hidden: true });
  button.append(image);
  button.addEventListener("click", async () => {
    try {
      open(await storedFile(url), parameters);
      $("stored-dialog").close();
    } catch (error) {
      $("stored-state").textContent = error.message;
    }
  });
  Object.assign(remove, { type: "button", className: "cancel-tile", textContent: "×" });
  remove.setAttribute("aria-label", `Delete: ${prompt}`);
  remove.addEventListener("click", () => removeImage(entry, id));
  entry.append(button, remove);
  return entry;
}

async function removeImage(entry, id) {
  if (!confirm("Delete this image from the server?")) return;
  try {
    await deleteStored(id);
    const next = entry.nextElementSibling ?? entry.previousElementSibling;
    entry.remove();
    (next?.firstChild ?? $("stored-search")).focus();
    $("stored-state").textContent = "Deleted";
  } catch (error) {
    $("stored-state").textContent = error.message;
  }
}

async function loadThumbnail(card, { thumbnail_url }, isCurrent) {
  if (!isCurrent()) return;
  const file = await storedFile(thumbnail_url).catch(() => null);
  if (file && isCurrent()) Object.assign(card.querySelector("img"), { src: URL.createObjectURL(file), hidden: false });
}
