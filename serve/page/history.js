// Finished images, stored in the browser (IndexedDB): the newest MAX_IMAGES.

const MAX_IMAGES = 200;

/** {all, add, remove, clear}. Without storage the history lasts as long as the page. */
export async function openHistory() {
  let database = null;
  try {
    database = await promiseOf(openDatabase());
  } catch {
    return memoryHistory();
  }
  const store = (mode) => database.transaction("pictures", mode).objectStore("pictures");
  return {
    /** All records, newest first. */
    all: async () => (await promiseOf(store("readonly").getAll())).map(upgrade).reverse(),
    /** Stores a record; returns the ids of the oldest ones, removed to stay within the limit. */
    add: async (record) => {
      await promiseOf(store("readwrite").put(record));
      const ids = await promiseOf(store("readonly").getAllKeys());
      const old = ids.slice(0, Math.max(0, ids.length - MAX_IMAGES));
      for (const id of old) await promiseOf(store("readwrite").delete(id));
      return old;
    },
    remove: (id) => promiseOf(store("readwrite").delete(id)),
    clear: () => promiseOf(store("readwrite").clear()),
  };
}

/** Earlier versions stored the image as `picture`. */
const upgrade = ({ picture, ...record }) => ({ image: picture, ...record });

/** Enforces the limit where nothing can be stored. */
function memoryHistory() {
  const ids = [];
  const add = async ({ id }) => {
    ids.push(id);
    return ids.splice(0, ids.length - MAX_IMAGES);
  };
  return { all: async () => [], add, remove: async () => {}, clear: async () => {} };
}

function openDatabase() {
  const request = indexedDB.open("sdrt", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id" });
  return request;
}

function promiseOf(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
