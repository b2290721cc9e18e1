// The page: what is open, what is being answered, and what every button does.

import { announce, Speaker } from "./announce.js";
import { models, props } from "./api.js";
import { Composer } from "./composer.js";
import { add, find, newConversation, newId, path, show, split } from "./conversation.js";
import { askForKey, confirmed, listShortcuts, prepareDialogs } from "./dialogs.js";
import { byId, fillIcons, toast } from "./dom.js";
import { Generation } from "./generation.js";
import { prepareTheme } from "./appearance.js";
import { read, write } from "./prefs.js";
import { useDefaults } from "./sampling.js";
import { Settings, defaultSystem } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Memory, Store } from "./store.js";
import { Thread } from "./thread.js";
import { download, exported, fileName, readFile } from "./transfer.js";

const APPLE = /Mac|iPhone|iPad/.test(navigator.platform);
const CONTROL = APPLE ? "⌘" : "Ctrl";

class Page {
  store = null;
  conversation = null;
  listed = [];
  running = new Map(); // conversation id: Generation
  removed = new Set(); // ids that nothing shall be kept of
  models = new Map(); // name: what /v1/models says of it
  window = null; // tokens of the model's context

  constructor() {
    fillIcons();
    prepareDialogs();
    prepareTheme();
    this.picker = byId("model");
    this.thread = new Thread({
      edit: (message, text) => this.ask(text, message.parent),
      again: (message) => this.again(message),
      show: (message) => this.showBranch(message),
    });
    this.composer = new Composer({
      send: (text) => this.ask(text, this.conversation.leaf),
      stop: () => this.stop(),
      editLast: () => this.editLast(),
    });
    this.sidebar = new Sidebar({
      open: (id) => this.open(id),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
      exportOne: (id) => this.exportOne(id),
    });
    this.settings = new Settings({
      system: (text) => this.setSystem(text),
      exportAll: () => this.exportAll(),
      importFile: (file) => this.importFile(file),
      deleteAll: () => this.deleteAll(),
      changeKey: () => this.changeKey(),
    });
    for (const id of ["new", "new-short"]) byId(id).addEventListener("click", () => this.begin());
    byId("show-settings").addEventListener("click", () => this.settings.open(this.conversation));
    byId("show-shortcuts").addEventListener("click", () => byId("shortcuts").showModal());
    this.picker.addEventListener("change", () => this.choose());
    document.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("pagehide", () => {
      for (const { conversation } of this.running.values()) this.save(conversation);
    });
    listShortcuts([
      [["Enter"], "Send the message"],
      [["Shift", "Enter"], "New line"],
      [["Esc"], "Stop the answer"],
      [["↑"], "Edit the last message, when the field is empty"],
      [[CONTROL, "Shift", "Enter"], "Regenerate the answer"],
      [[CONTROL, "Shift", "O"], "New conversation"],
      [[CONTROL, "Shift", "S"], "Show or hide the conversations"],
      [["Shift", "Esc"], "Go to the message field"],
      [[CONTROL, ","], "Settings"],
      [[CONTROL, "/"], "This list"],
    ]);
  }

  async start() {
    try {
      this.store = await Store.open((id) => this.changedElsewhere(id));
    } catch (error) {
      this.store = new Memory();
      this.notice(`This browser keeps nothing (${error?.message ?? "storage is off"}): conversations end with this page.`);
    }
    this.listed = await this.store.list();
    const last = location.hash.slice(1) || read("open");
    if (this.listed.some(({ id }) => id === last)) await this.open(last, false);
    else this.begin(false);
    await this.connect();
    if (matchMedia("(pointer: fine)").matches) this.composer.focus();
  }

  /** Learn which models there are. */
  async connect() {
    try {
      const found = await models();
      this.notice(null);
      this.models = new Map(found.map((model) => [model.id, model]));
      this.picker.replaceChildren(...found.map(({ id }) => new Option(id, id)));
      const wanted = read("model");
      if (found.some(({ id }) => id === wanted)) this.picker.value = wanted;
      this.picker.disabled = found.length < 2;
      this.picker.title = found.length < 2 ? "The server has one model" : "";
      if (!found.length) this.notice("The server has no model.");
      this.refresh();
      await this.learn();
    } catch (error) {
      if (error.status === 401 && (await askForKey())) {
        await this.connect();
        return;
      }
      this.notice(error.status === 401 ? "The server asks for an API key." : error.message, () => this.connect());
    }
    this.refresh();
  }

  /** Learn a model's context and defaults; one that is not in memory is not loaded for that. */
  async learn() {
    const model = this.picker.value;
    if (!model || this.models.get(model)?.status?.value === "unloaded") return;
    const said = (await props(model)).default_generation_settings ?? {};
    if (model !== this.picker.value) return;
    this.window = Number.isInteger(said.n_ctx) && said.n_ctx > 0 ? said.n_ctx : null;
    useDefaults(said.params);
  }

  async choose() {
    write("model", this.picker.value);
    this.window = null;
    this.refresh();
    try {
      await this.learn();
    } catch (error) {
      this.notice(error.message, () => this.connect());
    }
    this.refresh();
  }

  /** A sentence over the conversation; null removes it. */
  notice(text, again = null) {
    const box = byId("notice");
    box.hidden = text === null;
    box.replaceChildren(text ?? "");
    if (!again) return;
    const button = document.createElement("button");
    button.className = "text-button";
    button.type = "button";
    button.textContent = "Try again";
    button.addEventListener("click", again);
    box.append(" ", button);
  }

  /** Bring everything up to date. */
  refresh() {
    const { conversation } = this;
    this.thread.render(conversation);
    const empty = conversation.messages.length === 0;
    byId("welcome").hidden = !empty;
    byId("app").classList.toggle("empty", empty);
    document.title = conversation.title ? `${conversation.title} – phiquant` : "phiquant";
    this.sidebar.update(this.listed, conversation.id, new Set(this.running.keys()));
    this.composer.update(this.running.has(conversation.id), Boolean(this.picker.value));
    const used = path(conversation).findLast((message) => message.stats?.context)?.stats.context ?? null;
    this.composer.context(used, this.window);
  }

  begin(focus = true) {
    this.conversation = newConversation(defaultSystem());
    this.remember(null);
    this.refresh();
    this.sidebar.makeWay();
    if (focus) this.composer.focus();
  }

  async open(id, focus = true) {
    if (id !== this.conversation?.id) {
      const found = this.running.get(id)?.conversation ?? (await this.store.get(id));
      if (!found) return;
      // What was being written when a page was left will not go on.
      if (!this.running.has(id)) for (const message of found.messages) if (message.state === "running") message.state = "interrupted";
      this.conversation = found;
      this.remember(id);
      this.refresh();
      this.thread.follow();
    }
    this.sidebar.makeWay();
    if (focus && matchMedia("(pointer: fine)").matches) this.composer.focus();
  }

  /** A conversation of the list: the one in use if it is. */
  async whole(id) {
    const stored = await this.store.get(id);
    return this.running.get(id)?.conversation ?? (id === this.conversation.id ? this.conversation : stored);
  }

  remember(id) {
    write("open", id);
    history.replaceState(null, "", id ? `#${id}` : location.pathname + location.search);
  }

  async save(conversation) {
    if (this.removed.has(conversation.id)) return;
    const entry = this.listed.find(({ id }) => id === conversation.id);
    const { id, title, created, updated } = conversation;
    if (entry) Object.assign(entry, { title, updated });
    else this.listed.push({ id, title, created, updated });
    this.listed.sort((a, b) => b.updated - a.updated);
    try {
      await this.store.put(conversation);
    } catch (error) {
      this.notice(`The conversation could not be kept: ${error?.message ?? "the browser's storage is full"}.`);
    }
  }

  async ask(text, parent) {
    const { conversation } = this;
    if (this.running.has(conversation.id)) return;
    const question = add(conversation, parent, "user", text);
    this.remember(conversation.id);
    await this.answer(conversation, question);
  }

  async again(message) {
    const { conversation } = this;
    if (this.running.has(conversation.id)) return;
    await this.answer(conversation, find(conversation, message.parent));
  }

  async answer(conversation, question, retried = false) {
    const model = this.picker.value;
    const message = add(conversation, question.id, "assistant", "", { model, state: "running" });
    const speaker = new Speaker();
    const generation = new Generation(conversation, message, model, {
      changed: () => {
        if (conversation !== this.conversation) return;
        this.thread.progress(message, generation);
        speaker.update(split(message).answer);
      },
      save: () => this.save(conversation),
    });
    this.running.set(conversation.id, generation);
    this.save(conversation);
    const shown = conversation === this.conversation;
    const lost = shown && !byId("composer").contains(document.activeElement);
    this.refresh();
    this.thread.follow();
    if (lost && !retried) this.thread.view(message).element.focus({ preventScroll: true });
    announce("The model is answering.");
    await generation.run();
    this.running.delete(conversation.id);
    if (message.state === "done" && this.models.get(model)?.status?.value === "unloaded") this.connect();
    if (generation.error?.status === 401 && !retried) {
      const given = await askForKey(true);
      if (given) {
        conversation.messages.splice(conversation.messages.indexOf(message), 1);
        await this.answer(conversation, question, true);
        return;
      }
    }
    this.save(conversation);
    if (conversation === this.conversation) {
      const how = { done: "The answer is complete.", stopped: "The answer was stopped.", failed: "The answer failed." };
      speaker.end(split(message).answer, how[message.state]);
    }
    this.refresh();
  }

  stop() {
    this.running.get(this.conversation.id)?.stop();
  }

  showBranch(message) {
    const focused = document.activeElement?.getAttribute("aria-label");
    show(this.conversation, message);
    this.save(this.conversation);
    this.refresh();
    const element = this.thread.view(message)?.element;
    const same = focused && element?.querySelector(`[aria-label="${focused}"]:not(:disabled)`);
    (same || element)?.focus({ preventScroll: true });
  }

  editLast() {
    const last = path(this.conversation).findLast(({ role }) => role === "user");
    if (last && !this.running.has(this.conversation.id)) this.thread.view(last).edit();
  }

  setSystem(text) {
    this.conversation.system = text;
    if (this.conversation.messages.length) this.save(this.conversation);
  }

  async rename(id, title) {
    const conversation = await this.whole(id);
    conversation.title = title;
    await this.save(conversation);
    this.refresh();
  }

  async remove(id) {
    this.removed.add(id);
    this.running.get(id)?.stop();
    const conversation = await this.whole(id);
    await this.store.remove(id);
    this.listed = this.listed.filter((entry) => entry.id !== id);
    if (id === this.conversation.id) this.begin();
    else this.refresh();
    toast(`“${conversation.title}” is deleted.`, "Undo", async () => {
      this.removed.delete(id);
      await this.save(conversation);
      this.refresh();
    });
  }

  async deleteAll() {
    const count = this.listed.length;
    const text = `${count} conversation${count === 1 ? "" : "s"} will be gone from this browser for good.`;
    if (!(await confirmed("Delete all conversations?", text, "Delete all"))) return;
    for (const { id } of this.listed) this.removed.add(id);
    for (const generation of this.running.values()) generation.stop();
    await this.store.clear();
    this.listed = [];
    this.settings.dialog.close();
    this.begin();
  }

  async exportOne(id) {
    const conversation = await this.whole(id);
    download(fileName(conversation.title), exported([conversation]));
  }

  async exportAll() {
    download(`phiquant-${new Date().toISOString().slice(0, 10)}.json`, exported(await this.store.all()));
  }

  async importFile(file) {
    let found;
    try {
      found = await readFile(file);
    } catch (error) {
      toast(`Nothing was imported: ${error.message}.`);
      return;
    }
    const taken = new Set(this.listed.map(({ id }) => id));
    for (const conversation of found) {
      if (taken.has(conversation.id)) conversation.id = newId();
      taken.add(conversation.id);
    }
    await this.store.put(...found);
    this.listed = await this.store.list();
    this.refresh();
    toast(`${found.length} conversation${found.length === 1 ? " was" : "s were"} imported.`);
  }

  async changeKey() {
    this.settings.dialog.close();
    if (await askForKey()) await this.connect();
  }

  async changedElsewhere(id) {
    this.listed = await this.store.list();
    const { conversation } = this;
    if ((id === null || id === conversation.id) && !this.running.has(conversation.id)) {
      const found = await this.store.get(conversation.id);
      if (found) this.conversation = found;
      else if (conversation.messages.length) this.begin(false);
    }
    this.refresh();
  }

  key(event) {
    const control = event.ctrlKey || event.metaKey;
    const open = document.querySelector("dialog[open]");
    if (event.key === "Escape" && !open) {
      if (event.shiftKey) this.composer.focus();
      else this.stop();
      return;
    }
    if (open || !control || event.altKey) return;
    const run = {
      "shift+enter": () => {
        const last = path(this.conversation).at(-1);
        if (last?.role === "assistant") this.again(last);
      },
      "shift+o": () => this.begin(),
      "shift+s": () => this.sidebar.open(!this.sidebar.isOpen),
      ",": () => this.settings.open(this.conversation),
      "/": () => byId("shortcuts").showModal(),
    }[`${event.shiftKey ? "shift+" : ""}${event.key.toLowerCase()}`];
    if (!run) return;
    event.preventDefault();
    run();
  }
}

const page = new Page();
await page.start();
