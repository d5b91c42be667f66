// Mask painting. Knows its dialog only; returns a mask and stores nothing.

const $ = (id) => document.getElementById(id);
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

let brush = null; // [x, y] in image pixels

export function setUpMask() {
  const paint = $("mask-paint");
  paint.addEventListener("pointerdown", (event) => {
    paint.setPointerCapture(event.pointerId);
    brush = null;
    strokeTo(eventPosition(event));
  });
  paint.addEventListener("pointermove", (event) => {
    if (paint.hasPointerCapture(event.pointerId)) strokeTo(eventPosition(event));
  });
  paint.addEventListener("keydown", onKey);
  $("mask-brush").addEventListener("input", showCursor);
  $("mask-clear").addEventListener("click", clear);
  $("mask-cancel").addEventListener("click", () => $("mask-dialog").close(""));
}

/** Lets the user paint a mask over an image. Resolves to a PNG that is transparent in the area to
 * repaint, null if nothing is painted, or `mask` unchanged if the dialog is cancelled. */
export async function editMask(image, mask) {
  const url = URL.createObjectURL(image);
  $("mask-image").src = url;
  await $("mask-image").decode();
  $("mask-paint").width = $("mask-image").naturalWidth;
  $("mask-paint").height = $("mask-image").naturalHeight;
  $("mask-canvas").style.setProperty("--ratio", $("mask-paint").width / $("mask-paint").height);
  brush = [$("mask-paint").width / 2, $("mask-paint").height / 2];
  if (mask) await drawMask(mask);
  showCursor();
  const dialog = $("mask-dialog");
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  URL.revokeObjectURL(url);
  return dialog.returnValue ? createMask() : mask;
}

/** Paints an existing mask onto the canvas: white where the mask is transparent. */
async function drawMask(mask) {
  const context = $("mask-paint").getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, $("mask-paint").width, $("mask-paint").height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(await createImageBitmap(mask), 0, 0);
  context.globalCompositeOperation = "source-over";
}

async function createMask() {
  const paint = $("mask-paint");
  const pixels = paint.getContext("2d").getImageData(0, 0, paint.width, paint.height).data;
  if (!pixels.some(Boolean)) return null;
  const mask = new OffscreenCanvas(paint.width, paint.height);
  const context = mask.getContext("2d");
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(paint, 0, 0);
  return mask.convertToBlob({ type: "image/png" });
}

function eventPosition({ clientX, clientY }) {
  const paint = $("mask-paint");
  const { left, top, width, height } = paint.getBoundingClientRect();
  return [((clientX - left) * paint.width) / width, ((clientY - top) * paint.height) / height];
}

const brushWidth = () => ($("mask-paint").width * $("mask-brush").valueAsNumber) / 100;

function strokeTo(position) {
  const context = $("mask-paint").getContext("2d");
  Object.assign(context, { lineWidth: brushWidth(), lineCap: "round", lineJoin: "round", strokeStyle: "white" });
  context.beginPath();
  context.moveTo(...(brush ?? position));
  context.lineTo(...position);
  context.stroke();
  brush = position;
  showCursor();
}

/** Arrow keys move the brush; Space paints; Shift and arrow keys draw a line. */
function onKey(event) {
  const [x, y] = STEPS[event.key] ?? [];
  if (event.key !== " " && x === undefined) return;
  event.preventDefault();
  const step = brushWidth() / 2;
  const position = x === undefined ? brush : [brush[0] + x * step, brush[1] + y * step];
  const { width, height } = $("mask-paint");
  const inside = [Math.min(width, Math.max(0, position[0])), Math.min(height, Math.max(0, position[1]))];
  if (event.key === " " || event.shiftKey) strokeTo(inside);
  brush = inside;
  showCursor();
}

/** Updates the brush outline shown to keyboard users. */
function showCursor() {
  const { width, height } = $("mask-paint");
  const { style } = $("mask-dialog");
  style.setProperty("--x", brush[0] / width);
  style.setProperty("--y", brush[1] / height);
  style.setProperty("--brush", `${$("mask-brush").value}%`);
}

function clear() {
  const paint = $("mask-paint");
  paint.getContext("2d").clearRect(0, 0, paint.width, paint.height);
}
