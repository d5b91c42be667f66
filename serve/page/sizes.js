// The size of the image: the model's sizes, other aspect ratios, and a custom one.

import { addGroup, selectOption } from "./select.js";

const $ = (id) => document.getElementById(id);
const CUSTOM = "custom";
const RATIOS = ["1:1", "5:4", "4:3", "3:2", "16:9", "2:1"];
const MAX_DEVIATION = 0.1; // of a rounded size from the aspect ratio that it is listed under

export function setUpSizes() {
  $("size").addEventListener("change", showCustomSize);
  $("swap-size").addEventListener("click", () => {
    chooseSize(sizeOf().split("x").reverse().join("x"));
    $("size").dispatchEvent(new Event("input", { bubbles: true }));
  });
}

/** Lists the sizes of a model, its default first, then aspect ratios with about as many pixels. */
export function offerSizes(sizes, multiple, before) {
  const [first = "512x512"] = sizes;
  const presets = presetsOf(first, multiple ?? 8).filter(({ size }) => !sizes.includes(size));
  const ratios = Object.fromEntries(presets.map(({ size, ratio }) => [size, ratio]));
  const describe = (size) => [size.replace("x", " × "), ratios[size]].filter(Boolean).join(" · ");
  $("size").replaceChildren();
  addGroup($("size"), "Sizes of the model", sizes, describe);
  addGroup($("size"), "Aspect ratios", Object.keys(ratios), describe);
  $("size").add(new Option("Custom…", CUSTOM));
  for (const id of ["width", "height"]) $(id).step = $(id).min = multiple ?? 8;
  $("size-hint").textContent = `multiples of ${$("width").step}`;
  [$("width").value, $("height").value] = first.split("x");
  chooseSize(before ?? first);
}

function presetsOf(first, multiple) {
  const [width, height] = first.split("x").map(Number);
  const presets = RATIOS.flatMap((ratio) => {
    const [a, b] = ratio.split(":");
    const round = (side) => Math.max(1, Math.round(side / multiple)) * multiple;
    const long = round(Math.sqrt((width * height * a) / b));
    const short = round(Math.sqrt((width * height * b) / a));
    if (Math.abs((long / short) * (b / a) - 1) > MAX_DEVIATION) return [];
    const turned = { size: `${short}x${long}`, ratio: `${b}:${a}` };
    return [{ size: `${long}x${short}`, ratio }, ...(a === b ? [] : [turned])];
  });
  return presets.filter(({ size }, i) => presets.findIndex((other) => other.size === size) === i);
}

export const isCustom = () => $("size").value === CUSTOM;
export const sizeOf = () => (isCustom() ? `${$("width").value}x${$("height").value}` : $("size").value);

function showCustomSize() {
  $("custom-size").hidden = !isCustom();
}

/** Selects a listed size, or enters it as a custom one; returns whether it is possible. */
export function chooseSize(size) {
  const [width, height] = /^(\d+)x(\d+)$/.exec(size ?? "")?.slice(1).map(Number) ?? [];
  const listed = selectOption($("size"), size);
  if (!listed && [width, height].every(fitsStep)) {
    Object.assign($("width"), { value: width });
    Object.assign($("height"), { value: height });
    $("size").value = CUSTOM;
  }
  showCustomSize();
  return listed || isCustom();
}

function fitsStep(side) {
  return side >= Number($("width").min) && side <= Number($("width").max) && side % Number($("width").step) === 0;
}
