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
  const read = () => database.transaction("pictures").objectStore("pictures");
  /** Commits at once: the change holds even where the page is left right after. */
  const write = (change) =>
    new Promise((resolve, reject) => {
      const transaction = database.transaction("pictures", "readwrite");
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error);
      change(transaction.objectStore("pictures"));
      transaction.commit();
    });
  const remove = (ids) => write((store) => ids.forEach((id) => store.delete(id)));
  return {
    /** All records, newest first. */
    all: async () => (await promiseOf(read().getAll())).map(upgrade).reverse(),
    /** Stores a record; returns the ids of the oldest ones, removed to stay within the limit. */
    add: async (record) => {
      await write((store) => store.put(record));
      const ids = await promiseOf(read().getAllKeys());
      const old = ids.slice(0, Math.max(0, ids.length - MAX_IMAGES));
      await remove(old);
      return old;
    },
    remove,
    clear: () => write((store) => store.clear()),
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
