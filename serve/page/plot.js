// The X/Y plot: a grid of images that differ in two settings. Knows its dialog; the queue, the page.

import { applyAxis, AXES, parseAxis } from "./axes.js";
import { isActive } from "./queue.js";
import { describeState, settingsText } from "./view.js";

const $ = (id) => document.getElementById(id);
const SIDES = ["x", "y"];
const LABEL = 28; // px: height of a line of text in the downloaded grid
const GAP = 8;

const MIN_CELL = 192;

let plot = null; // {x, y, items, cells: Map of item → td}

/** `page`: {read(), samplers(), generate(settings) → items, show(item), cancel(item), showError(text)}. */
export function setUpPlot(page) {
  for (const side of SIDES) {
    $(`plot-${side}`).replaceChildren(new Option("None", ""), ...Object.keys(AXES).map((name) => new Option(name)));
    $(`plot-${side}`).addEventListener("change", () => showHint(side, page.samplers()));
    $(`plot-${side}-values`).addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      event.preventDefault(); // else it would generate one image
      start(page);
    });
  }
  $("plot-generate").addEventListener("click", () => start(page));
  $("plot-open").addEventListener("click", () => $("plot-dialog").showModal());
  $("plot-cancel").addEventListener("click", () => plot.items.filter(isActive).forEach(page.cancel));
  $("plot-download").addEventListener("click", download);
}

function showHint(side, samplers) {
  const examples = {
    Sampler: samplers.slice(0, 2).map(({ name }) => name).join(", "),
    Steps: "10, 20, 30",
    "Guidance scale": "3, 5, 7.5",
    Seed: "1, 2, 3",
    "Feature reuse": "1, 2, 3",
    "Output reuse": "1, 3, 5",
    "LoRA weight": "0, 0.5, 1",
    "Prompt S/R": "red, green, blue",
  };
  $(`plot-${side}-values`).placeholder = examples[$(`plot-${side}`).value] ?? "";
}

function start(page) {
  const settings = page.read();
  if (!settings) return;
  let axes = null;
  try {
    axes = SIDES.map((side) => parseAxis($(`plot-${side}`).value, $(`plot-${side}-values`).value, settings, page.samplers()));
  } catch (error) {
    return page.showError(error.message);
  }
  const [x, y] = axes;
  if (!x.name && !y.name) return page.showError("Choose what an axis of the grid changes.");
  const changed = y.values.flatMap((b) => x.values.map((a) => applyAxis(applyAxis(settings, x, a), y, b)));
  plot = { x, y, items: page.generate(changed), cells: new Map() };
  showTable(page);
  $("plot-open").hidden = false;
  $("plot-dialog").showModal();
}

function showTable(page) {
  const { x, y, items } = plot;
  const label = ({ name }, value) => (name ? `${name}: ${value}` : "");
  for (const image of $("plot-table").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  const head = document.createElement("tr");
  head.append(document.createElement("td"), ...x.values.map((value) => heading(label(x, value), "col")));
  const rows = y.values.map((value, j) => {
    const row = document.createElement("tr");
    const own = items.slice(j * x.values.length, (j + 1) * x.values.length);
    row.append(heading(label(y, value), "row"), ...own.map((item) => createCell(item, page)));
    return row;
  });
  $("plot-table").replaceChildren(head, ...rows);
  items.forEach(updatePlot);
}

function heading(text, scope) {
  const cell = document.createElement("th");
  Object.assign(cell, { textContent: text, scope });
  return cell;
}

function createCell(item, page) {
  const [cell, button, image, state] = ["td", "button", "img", "span"].map((tag) => document.createElement(tag));
  Object.assign(button, { type: "button", className: "tile" });
  button.append(image, state);
  button.addEventListener("click", () => {
    $("plot-dialog").close();
    page.show(item);
  });
  cell.append(button);
  plot.cells.set(item, cell);
  return cell;
}

/** Updates the cell of an image, if it is one of the grid. */
export function updatePlot(item) {
  const cell = plot?.cells.get(item);
  if (!cell) return;
  const [image, state] = cell.firstChild.children;
  const done = item.state === "done";
  image.hidden = !done;
  state.hidden = done;
  state.textContent = item.error?.message ?? describeState(item);
  image.alt = done ? settingsText(item.settings) : "";
  if (done && !image.src) image.src = URL.createObjectURL(item.image);
  const { items } = plot;
  const count = items.filter((other) => other.state === "done").length;
  $("plot-state").textContent = `${count} of ${items.length} images`;
  $("plot-cancel").hidden = !items.some(isActive);
  $("plot-download").disabled = !count;
}

async function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await drawGrid());
  link.download = "grid.png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** The settings that all images share. */
function describeCommon(items) {
  const parts = items.map(({ settings }) => settingsText(settings).split(" · "));
  return parts[0].filter((part) => parts.every((own) => own.includes(part))).join(" · ");
}

/** The grid as one PNG, with its labels and settings; a cell without an image is empty. */
async function drawGrid() {
  const { x, y, items } = plot;
  const text = describeCommon(items);
  const images = await Promise.all(items.map((item) => (item.state === "done" ? createImageBitmap(item.image) : null)));
  const largest = (side) => Math.max(...images.map((image) => image?.[side] ?? 0));
  const scale = Math.ceil(MIN_CELL / largest("width")); // so that labels fit above small images
  const [width, height] = [scale * largest("width"), scale * largest("height")];
  const left = y.name ? Math.max(160, width / 2) : 0;
  const top = x.name ? LABEL : 0;
  const columns = x.values.length;
  const canvas = new OffscreenCanvas(
    left + columns * (width + GAP) + GAP,
    top + y.values.length * (height + GAP) + GAP + LABEL,
  );
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  Object.assign(context, { fillStyle: "black", font: "16px sans-serif", textAlign: "center", textBaseline: "middle" });
  const at = (i, j) => [left + GAP + i * (width + GAP), top + GAP + j * (height + GAP)];
  if (x.name) x.values.forEach((v, i) => context.fillText(`${x.name}: ${v}`, at(i, 0)[0] + width / 2, top / 2, width));
  if (y.name) y.values.forEach((v, j) => context.fillText(`${y.name}: ${v}`, left / 2, at(0, j)[1] + height / 2, left - GAP));
  context.imageSmoothingEnabled = false;
  images.forEach((image, k) => {
    const place = at(k % columns, Math.floor(k / columns));
    if (image) context.drawImage(image, ...place, scale * image.width, scale * image.height);
  });
  context.fillText(text, canvas.width / 2, canvas.height - LABEL / 2, canvas.width - 2 * GAP);
  return canvas.convertToBlob({ type: "image/png" });
}
