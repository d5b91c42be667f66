// The prompts: token counts, weights by keyboard, and the LoRAs that are named. Knows no other field.

import { countTokens } from "./api.js";

const $ = (id) => document.getElementById(id);
const DELAY = 300; // ms after the last change
const FIELDS = ["prompt", "negative_prompt"];
const STEP = 0.1; // of a weight, as in A1111; half of it for LoRAs
const LORA = /<lora:([^:>]+)(?::([^:>]*))?((?::[^>]*)?)>/g;
const WORD_ENDS = /[\s.,;:!?/(){}[\]<>]/;
let target = null; // the field that was edited last

/** `modelOf()` names the model whose tokenizer counts; falsy before it is loaded. */
export function setUpPrompts(modelOf) {
  const timers = {};
  const count = (id) => {
    clearTimeout(timers[id]);
    timers[id] = setTimeout(() => showCount(id, modelOf()), DELAY);
  };
  target = $("prompt");
  for (const id of FIELDS) {
    $(id).addEventListener("input", () => count(id));
    $(id).addEventListener("focus", () => (target = $(id)));
    $(id).addEventListener("keydown", onKey);
  }
  $("prompt").addEventListener("input", showLoras);
  showLoras();
  return () => FIELDS.forEach(count);
}

async function showCount(id, model) {
  const prompt = $(id).value;
  if (!model) return;
  try {
    const { tokens, limit } = await countTokens({ prompt, model });
    if ($(id).value !== prompt) return;
    $(`${id}-tokens`).textContent = `${tokens}/${limit}`;
    $(`${id}-tokens`).title = `${tokens} of ${limit} tokens`;
  } catch {
    $(`${id}-tokens`).textContent = ""; // the prompt cannot be read, or the model has no tokenizer
  }
}

/** Replaces a range of a field's text, so that the browser can undo it. */
function replaceText(field, start, end, text) {
  field.focus();
  field.setSelectionRange(start, end);
  const isFocused = document.activeElement === field; // not behind a dialog
  if (isFocused && (text ? document.execCommand("insertText", false, text) : document.execCommand("delete"))) return;
  field.setRangeText(text, start, end, "end");
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

function onKey(event) {
  const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (!direction || !(event.ctrlKey || event.metaKey) || event.altKey || event.shiftKey) return;
  event.preventDefault();
  const field = event.target;
  const change = changeWeight(field.value, field.selectionStart, field.selectionEnd, direction * STEP);
  if (!change) return;
  replaceText(field, change.start, change.end, change.text);
  field.setSelectionRange(change.selection[0], change.selection[1]);
}

/** The replacement that changes the weight of a selection, or of the word at the caret:
 * {start, end, text, selection}; null where there is nothing to weight. */
export function changeWeight(text, start, end, step) {
  for (const tag of text.matchAll(LORA)) {
    const last = tag.index + tag[0].length;
    if (start < tag.index || end > last) continue;
    const weight = round(Number(tag[2] || 1) + step / 2);
    if (Number.isNaN(weight)) return null;
    const changed = loraTag(tag[1], weight, tag[3]);
    return { start: tag.index, end: last, text: changed, selection: [tag.index, tag.index + changed.length] };
  }
  if (start === end) [start, end] = groupAt(text, start) ?? wordAt(text, start);
  while (start < end && text[end - 1] === " ") end--; // a double click selects a space, too
  if (start === end) return null;
  const inner = text.slice(start, end);
  const after = text[start - 1] === "(" ? /^(?::([\d.]+))?\)/.exec(text.slice(end)) : null;
  const weight = round((after ? Number(after[1] ?? 1.1) : 1) + step);
  const from = after ? start - 1 : start;
  const to = after ? end + after[0].length : end;
  if (weight < 0) return null;
  if (weight === 1) return { start: from, end: to, text: inner, selection: [from, from + inner.length] };
  return { start: from, end: to, text: `(${inner}:${weight})`, selection: [from + 1, from + 1 + inner.length] };
}

const round = (weight) => Number(weight.toFixed(2));
const loraTag = (name, weight, rest = "") => `<lora:${name}:${weight}${rest}>`;

/** The text of the innermost brackets around a position. */
function groupAt(text, at) {
  const open = text.lastIndexOf("(", at - 1);
  if (open < 0 || text.slice(open, at).includes(")")) return null;
  const inner = /^([^()]*?)(?::[\d.]+)?\)/.exec(text.slice(open + 1));
  return inner && open + 1 + inner[0].length >= at ? [open + 1, open + 1 + inner[1].length] : null;
}

function wordAt(text, at) {
  let [start, end] = [at, at];
  while (start > 0 && !WORD_ENDS.test(text[start - 1])) start--;
  while (end < text.length && !WORD_ENDS.test(text[end])) end++;
  return [start, end];
}

/** The LoRAs of the prompt: {name, weight, rest, start, end} each. */
function lorasOf() {
  return [...$("prompt").value.matchAll(LORA)].map((tag) => ({
    name: tag[1],
    weight: tag[2] || "1",
    rest: tag[3],
    start: tag.index,
    end: tag.index + tag[0].length,
  }));
}

export const hasLora = (name) => lorasOf().some((lora) => lora.name === name);

/** Adds a LoRA to the prompt, or removes it. */
export function toggleLora(name) {
  const lora = lorasOf().find((lora) => lora.name === name);
  if (lora) return removeLora(lora);
  insertText($("prompt"), loraTag(name, 1));
}

function removeLora({ start, end }) {
  const before = $("prompt").value[start - 1] === " " ? 1 : 0;
  replaceText($("prompt"), start - before, end, "");
}

/** Adds a word to the prompt that was edited last. */
export const insertWord = (word) => insertText(target, word);

function insertText(field, text) {
  const end = field.value.length;
  replaceText(field, end, end, end && !/\s$/.test(field.value) ? ` ${text}` : text);
}

/** Lists the LoRAs of the prompt with their weights. */
function showLoras() {
  const loras = lorasOf();
  const rows = [...$("loras").children];
  if (loras.map(({ name }) => name).join() !== rows.map((row) => row.dataset.name).join()) {
    $("loras").replaceChildren(...loras.map(createRow));
  }
  [...$("loras").children].forEach((row, i) => {
    const box = row.querySelector("input");
    if (document.activeElement !== box) box.value = loras[i].weight;
  });
}

function createRow({ name }, i) {
  const [row, label, box, remove] = ["li", "label", "input", "button"].map((tag) => document.createElement(tag));
  row.dataset.name = name;
  Object.assign(box, { type: "number", step: 0.05, min: -10, max: 10, id: `lora-${i}` });
  Object.assign(label, { textContent: name, htmlFor: box.id });
  Object.assign(remove, { type: "button", textContent: "Remove", className: "plain" });
  remove.setAttribute("aria-label", `Remove ${name}`);
  box.addEventListener("input", (event) => {
    event.stopPropagation(); // the prompt's own event follows
    const { start, end, rest } = lorasOf()[i];
    if (!box.validity.valid || box.value === "") return;
    $("prompt").setRangeText(loraTag(name, box.valueAsNumber, rest), start, end);
    $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
  });
  remove.addEventListener("click", () => removeLora(lorasOf()[i]));
  row.append(label, box, remove);
  return row;
}
