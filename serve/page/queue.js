// The queue of images to generate. Knows the order of requests and their events; not the page.

import { generate, imageFromBase64 } from "./api.js";

const MAX_STREAMS = 4; // browsers allow six connections per host; keep two free
const ACTIVE_STATES = ["waiting", "queued", "running"];

export const isActive = (item) => ACTIVE_STATES.includes(item.state);

/** An image to generate: waiting → queued → running → done, failed or cancelled. */
export function createItem(settings) {
  return { id: newId(), state: "waiting", settings, step: 0, total: 0, position: null, error: null };
}

let last = 0;
function newId() {
  last = Math.max(last + 1, Date.now() * 1000); // increases with time: the order of the history
  return last;
}

/** Returns {add, cancel}; calls `onChange(item, eventName)` for every event. */
export function createQueue(onChange) {
  const waiting = [];
  const running = new Map();
  let sent = null; // not yet accepted; sending one at a time keeps the order at the server

  function pump() {
    if (sent || !waiting.length || running.size >= MAX_STREAMS) return;
    sent = waiting.shift();
    const item = sent;
    const controller = new AbortController();
    running.set(item, controller);
    run(item, controller.signal).finally(() => {
      running.delete(item);
      next(item);
    });
  }

  function next(item) {
    if (sent === item) sent = null;
    pump();
  }

  async function run(item, signal) {
    try {
      for await (const event of generate(item.settings, signal)) {
        if (event.type === "accepted") next(item);
        else applyEvent(item, event, onChange);
      }
      if (item.state !== "done") throw new Error("The connection closed before the image was finished.");
    } catch (error) {
      if (item.state === "done") return;
      item.image = null; // it was only a preview
      finish(item, signal.aborted ? "cancelled" : "failed", error);
    }
  }

  function finish(item, state, error = null) {
    Object.assign(item, { state, error });
    onChange(item, state);
  }

  return {
    add(items) {
      waiting.push(...items);
      pump();
    },
    cancel(item) {
      const at = waiting.indexOf(item);
      if (at < 0) return running.get(item)?.abort();
      waiting.splice(at, 1);
      finish(item, "cancelled");
    },
  };
}

function applyEvent(item, event, onChange) {
  const what = event.type.split(".").pop();
  if (what !== "queued") item.started ??= performance.now();
  if (what === "queued") Object.assign(item, { state: "queued", position: event.position });
  if (what === "progress") applyProgress(item, event);
  if (what === "partial_image") Object.assign(item, { state: "running", image: imageFromBase64(event.b64_json) });
  if (what === "completed") {
    if (event.seed !== undefined) item.settings.seed = String(event.seed);
    const seconds = Number(((performance.now() - item.started) / 1000).toPrecision(2));
    Object.assign(item, { state: "done", image: imageFromBase64(event.b64_json), seconds });
  }
  onChange(item, what);
}

/** Records the step and its time, from which the remaining time is estimated. */
function applyProgress(item, { step, total }) {
  const stepAt = performance.now();
  if (item.firstStep === undefined) Object.assign(item, { firstStep: step, firstStepAt: stepAt });
  Object.assign(item, { state: "running", step, total, stepAt });
}
