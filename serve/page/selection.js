// Several images of the history: compared, downloaded as one file, removed.

import { openCompare } from "./compare.js";
import { fileName, tileOf } from "./view.js";
import { createZip } from "./zip.js";

const $ = (id) => document.getElementById(id);

/** `page`: {items, remove(items), announce(text)}. Returns {select, show}. */
export function createSelection(page) {
  const selected = new Set();
  let active = false;

  function setActive(value) {
    active = value;
    if (!active) selected.clear();
    show();
  }

  /** Updates the tiles and the buttons; called whenever the tiles change. */
  function show() {
    for (const item of selected) if (!page.items.includes(item)) selected.delete(item);
    $("select").hidden = active || !page.items.some(isDone);
    $("selection").hidden = !active;
    for (const item of page.items) {
      const button = tileOf(item);
      if (!button) continue;
      if (active && isDone(item)) button.setAttribute("aria-pressed", selected.has(item));
      else button.removeAttribute("aria-pressed");
    }
    $("selection-count").textContent = `${selected.size} selected`;
    $("compare").disabled = selected.size !== 2;
    for (const id of ["download-zip", "remove-selected"]) $(id).disabled = !selected.size;
  }

  const inOrder = () => page.items.filter((item) => selected.has(item));

  $("select").addEventListener("click", () => {
    setActive(true);
    page.announce("Choose images to select");
    tileOf(page.items.find(isDone))?.focus();
  });
  $("selection-done").addEventListener("click", () => {
    setActive(false);
    $("select").focus();
  });
  $("compare").addEventListener("click", () => openCompare(...inOrder()));
  $("download-zip").addEventListener("click", () => downloadZip(inOrder()));
  $("remove-selected").addEventListener("click", () => {
    page.remove(inOrder());
    setActive(false);
  });

  return {
    show,
    /** Handles a click on a tile; returns whether it selected the image. */
    select(item, { ctrlKey, metaKey }) {
      if (!(active || ctrlKey || metaKey) || !isDone(item)) return active;
      active = true;
      if (!selected.delete(item)) selected.add(item);
      show();
      return true;
    },
  };
}

const isDone = ({ state }) => state === "done";

async function downloadZip(items) {
  const date = new Date();
  const names = new Set();
  const files = items.map((item) => ({ name: uniqueName(fileName(item), names), blob: item.image, date }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await createZip(files));
  link.download = "images.zip";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** The name, with a number if it is taken already. */
function uniqueName(name, names) {
  let unique = name;
  for (let i = 2; names.has(unique); i++) unique = name.replace(/(\.\w+)$/, `-${i}$1`);
  names.add(unique);
  return unique;
}
