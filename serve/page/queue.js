// Pictures being made. Knows the order of requests and what their events mean; shows nothing.

import { generate, pictureFrom } from "./api.js";

const MOST_STREAMS = 4; // browsers open six connections to a host; two stay free
const IN_FLIGHT = ["waiting", "queued", "running"];

export const inFlight = (item) => IN_FLIGHT.includes(item.state);

/** One picture to make: waiting → queued → running → done, failed or cancelled. */
export function itemFrom(settings) {
  return { id: newId(), state: "waiting", settings, step: 0, total: 0, position: null, error: null };
}

let last = 0;
function newId() {
  last = Math.max(last + 1, Date.now() * 1000); // grows with time: the history's order
  return last;
}

/** {add, cancel}; `changed(item, what)` hears of every event. */
export function createQueue(changed) {
  const waiting = [];
  const running = new Map();
  let sent = null; // and not yet accepted: one by one they keep their order at the server

  function pump() {
    if (sent || !waiting.length || running.size >= MOST_STREAMS) return;
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
        else take(item, event, changed);
      }
      if (item.state !== "done") throw new Error("The connection ended before the picture was finished.");
    } catch (error) {
      if (item.state === "done") return;
      item.picture = null; // a preview is no picture
      end(item, signal.aborted ? "cancelled" : "failed", error);
    }
  }

  function end(item, state, error = null) {
    Object.assign(item, { state, error });
    changed(item, state);
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
      end(item, "cancelled");
    },
  };
}

function take(item, event, changed) {
  const what = event.type.split(".").pop();
  if (what !== "queued") item.begun ??= performance.now();
  if (what === "queued") Object.assign(item, { state: "queued", position: event.position });
  if (what === "progress") Object.assign(item, { state: "running", step: event.step, total: event.total });
  if (what === "partial_image") Object.assign(item, { state: "running", picture: pictureFrom(event.b64_json) });
  if (what === "completed") {
    if (event.seed !== undefined) item.settings.seed = String(event.seed);
    const seconds = Number(((performance.now() - item.begun) / 1000).toPrecision(2));
    Object.assign(item, { state: "done", picture: pictureFrom(event.b64_json), seconds });
  }
  changed(item, what);
}
