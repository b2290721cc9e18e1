// Conversations in IndexedDB: one store of whole ones, one of what the list shows, written together.

const NAME = "phiquant";
const WHOLE = "conversations";
const LISTED = "list";

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const listed = ({ id, title, created, updated }) => ({ id, title, created, updated });

export class Store {
  #db;
  #channel;

  /** Error if this browser keeps nothing. `changed` is called with an id, or null, when another tab wrote. */
  static async open(changed) {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore(WHOLE, { keyPath: "id" });
      opening.result.createObjectStore(LISTED, { keyPath: "id" });
    };
    const store = new Store();
    store.#db = await settled(opening);
    store.#db.onversionchange = () => store.#db.close();
    store.#channel = new BroadcastChannel(NAME);
    store.#channel.onmessage = (event) => changed(event.data);
    return store;
  }

  /** What there is, the latest first: [{id, title, created, updated}]. */
  async list() {
    const found = await settled(this.#db.transaction(LISTED).objectStore(LISTED).getAll());
    return found.sort((a, b) => b.updated - a.updated);
  }

  /** The whole conversation; undefined if there is none. */
  get(id) {
    return settled(this.#db.transaction(WHOLE).objectStore(WHOLE).get(id));
  }

  all() {
    return settled(this.#db.transaction(WHOLE).objectStore(WHOLE).getAll());
  }

  put(...conversations) {
    return this.#write(conversations.length === 1 ? conversations[0].id : null, (whole, list) => {
      for (const conversation of conversations) {
        whole.put(conversation);
        list.put(listed(conversation));
      }
    });
  }

  remove(id) {
    return this.#write(id, (whole, list) => {
      whole.delete(id);
      list.delete(id);
    });
  }

  clear() {
    return this.#write(null, (whole, list) => {
      whole.clear();
      list.clear();
    });
  }

  #write(id, change) {
    return new Promise((resolve, reject) => {
      const transaction = this.#db.transaction([WHOLE, LISTED], "readwrite");
      transaction.oncomplete = () => {
        this.#channel.postMessage(id);
        resolve();
      };
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
      change(transaction.objectStore(WHOLE), transaction.objectStore(LISTED));
    });
  }
}

/** The same, forgotten with the page: for browsers that keep nothing. */
export class Memory {
  #all = new Map();

  async list() {
    return [...this.#all.values()].map(listed).sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.#all.get(id);
  }

  async all() {
    return [...this.#all.values()];
  }

  async put(...conversations) {
    for (const conversation of conversations) this.#all.set(conversation.id, conversation);
  }

  async remove(id) {
    this.#all.delete(id);
  }

  async clear() {
    this.#all.clear();
  }
}
