// Painting what of a picture is to be made new. Knows one dialog; gives a mask, keeps nothing.

const $ = (id) => document.getElementById(id);
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

let brush = null; // [x, y] in the picture's pixels

export function setUpMask() {
  const paint = $("mask-paint");
  paint.addEventListener("pointerdown", (event) => {
    paint.setPointerCapture(event.pointerId);
    brush = null;
    strokeTo(placeOf(event));
  });
  paint.addEventListener("pointermove", (event) => {
    if (paint.hasPointerCapture(event.pointerId)) strokeTo(placeOf(event));
  });
  paint.addEventListener("keydown", steer);
  $("mask-brush").addEventListener("input", point);
  $("mask-clear").addEventListener("click", clear);
  $("mask-cancel").addEventListener("click", () => $("mask-dialog").close(""));
}

/** The mask that the user paints over a picture, a PNG that is transparent where it is to be made
 * new; null if nothing is painted, and `mask` as it was if the dialog is left. */
export async function paintedMask(picture, mask) {
  const url = URL.createObjectURL(picture);
  $("mask-picture").src = url;
  await $("mask-picture").decode();
  $("mask-paint").width = $("mask-picture").naturalWidth;
  $("mask-paint").height = $("mask-picture").naturalHeight;
  $("mask-canvas").style.setProperty("--ratio", $("mask-paint").width / $("mask-paint").height);
  brush = [$("mask-paint").width / 2, $("mask-paint").height / 2];
  if (mask) await show(mask);
  point();
  const dialog = $("mask-dialog");
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  URL.revokeObjectURL(url);
  return dialog.returnValue ? made() : mask;
}

/** From another's mask to what was painted: the picture is covered but for what the mask covers. */
async function show(mask) {
  const context = $("mask-paint").getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, $("mask-paint").width, $("mask-paint").height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(await createImageBitmap(mask), 0, 0);
  context.globalCompositeOperation = "source-over";
}

async function made() {
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

function placeOf({ clientX, clientY }) {
  const paint = $("mask-paint");
  const { left, top, width, height } = paint.getBoundingClientRect();
  return [((clientX - left) * paint.width) / width, ((clientY - top) * paint.height) / height];
}

const breadth = () => ($("mask-paint").width * $("mask-brush").valueAsNumber) / 100;

function strokeTo(place) {
  const context = $("mask-paint").getContext("2d");
  Object.assign(context, { lineWidth: breadth(), lineCap: "round", lineJoin: "round", strokeStyle: "white" });
  context.beginPath();
  context.moveTo(...(brush ?? place));
  context.lineTo(...place);
  context.stroke();
  brush = place;
  point();
}

/** Arrow keys move the brush; the space bar paints, and so do arrow keys with the shift key. */
function steer(event) {
  const [x, y] = STEPS[event.key] ?? [];
  if (event.key !== " " && x === undefined) return;
  event.preventDefault();
  const step = breadth() / 2;
  const place = x === undefined ? brush : [brush[0] + x * step, brush[1] + y * step];
  const { width, height } = $("mask-paint");
  const inside = [Math.min(width, Math.max(0, place[0])), Math.min(height, Math.max(0, place[1]))];
  if (event.key === " " || event.shiftKey) strokeTo(inside);
  brush = inside;
  point();
}

/** Where the brush is, for those who steer it by keys. */
function point() {
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
