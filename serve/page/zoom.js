// Zooming and panning of an element that scrolls: wheel, keys and buttons. Knows no images.

const MAX = 16;
const STEP = 1.25;

/** Makes a scroller zoom what it contains, which is sized by `--zoom`; returns a function that resets it. */
export function setUpZoom(scroller, { zoomIn, zoomOut }) {
  let zoom = 1;
  let moved = false;

  function zoomTo(value, x = scroller.clientWidth / 2, y = scroller.clientHeight / 2) {
    const next = Math.min(MAX, Math.max(1, value));
    const [left, top] = [scroller.scrollLeft + x, scroller.scrollTop + y].map((at) => (at * next) / zoom);
    zoom = next;
    scroller.style.setProperty("--zoom", zoom);
    scroller.scrollTo({ left: left - x, top: top - y, behavior: "instant" });
    zoomOut.disabled = zoom === 1;
    zoomIn.disabled = zoom === MAX;
  }

  zoomIn.addEventListener("click", () => zoomTo(zoom * STEP));
  zoomOut.addEventListener("click", () => zoomTo(zoom / STEP));
  scroller.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { left, top } = scroller.getBoundingClientRect();
    zoomTo(zoom * STEP ** -Math.sign(event.deltaY), event.clientX - left, event.clientY - top);
  }, { passive: false });
  scroller.closest("dialog").addEventListener("keydown", (event) => {
    const factor = { "+": STEP, "=": STEP, "-": 1 / STEP, 0: 1 / zoom }[event.key];
    if (factor && !event.ctrlKey && !event.metaKey) zoomTo(zoom * factor);
  });
  scroller.addEventListener("pointerdown", () => (moved = false));
  scroller.addEventListener("pointermove", (event) => {
    if (event.buttons !== 1 || event.pointerType !== "mouse") return; // touch pans by itself
    moved ||= Math.abs(event.movementX) + Math.abs(event.movementY) > 1;
    scroller.scrollBy({ left: -event.movementX, top: -event.movementY, behavior: "instant" });
  });
  scroller.addEventListener("click", (event) => moved && event.preventDefault()); // the end of a pan
  scroller.addEventListener("dragstart", (event) => event.preventDefault());
  return () => zoomTo(1);
}
