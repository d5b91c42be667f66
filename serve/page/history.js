// Finished pictures, kept in the browser: the newest MOST of them, over reloads where it lets us.

const MOST = 200;

/** {all, keep, drop, clear}; what cannot be stored stays in the page and goes with it. */
export async function openHistory() {
  let database = null;
  try {
    database = await promised(opening());
  } catch {
    return forgetful();
  }
  const store = (mode) => database.transaction("pictures", mode).objectStore("pictures");
  return {
    /** Records, the newest first. */
    all: async () => (await promised(store("readonly").getAll())).reverse(),
    /** Keep one; the ids of those that had to go for it come back. */
    keep: async (record) => {
      await promised(store("readwrite").put(record));
      const ids = await promised(store("readonly").getAllKeys());
      const old = ids.slice(0, Math.max(0, ids.length - MOST));
      for (const id of old) await promised(store("readwrite").delete(id));
      return old;
    },
    drop: (id) => promised(store("readwrite").delete(id)),
    clear: () => promised(store("readwrite").clear()),
  };
}

/** Where nothing may be stored: only the bound is kept. */
function forgetful() {
  const ids = [];
  const keep = async ({ id }) => {
    ids.push(id);
    return ids.splice(0, ids.length - MOST);
  };
  return { all: async () => [], keep, drop: async () => {}, clear: async () => {} };
}

function opening() {
  const request = indexedDB.open("sdrt", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id" });
  return request;
}

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
