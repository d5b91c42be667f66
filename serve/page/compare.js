// Two images over each other, with a line between them that moves. Knows its dialog only.

import { settingsText } from "./view.js";
import { setUpZoom } from "./zoom.js";

const $ = (id) => document.getElementById(id);
let resetZoom = null;

/** Shows two images of the history: the first on the left of the line, the second on the right. */
export function openCompare(left, right) {
  resetZoom ??= setUp();
  for (const [side, item] of [["left", left], ["right", right]]) {
    const image = $(`compare-${side}`);
    URL.revokeObjectURL(image.src);
    Object.assign(image, { src: URL.createObjectURL(item.image), alt: item.settings.prompt });
    $(`compare-${side}-text`).textContent = settingsText(item.settings);
  }
  $("compare-split").value = 50;
  showSplit();
  $("compare-dialog").showModal();
  resetZoom();
}

function setUp() {
  $("compare-split").addEventListener("input", showSplit);
  return setUpZoom($("compare-scroller"), { zoomIn: $("compare-in"), zoomOut: $("compare-out") });
}

function showSplit() {
  $("compare-dialog").style.setProperty("--split", `${$("compare-split").value}%`);
}
