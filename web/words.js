// A node's own sentence: what it found or wrote, or what was wrong. `read`: () => promise of the
// events of its last run, if it keeps them.
import { make, scrolls } from "./dom.js";

export class Words {
  constructor(before, read = async () => []) {
    Object.assign(this, { read, run: "", client: null });
    this.text = make("div", "cntlora-text", { role: "status", "aria-live": "polite" });
    this.root = make("div", "cntlora-panel cntlora-words", {}, this.text);
    scrolls(this.text);
    this.#show(before, "cntlora-hint");
  }

  #show(text, className = "") {
    this.text.className = `cntlora-text ${className}`;
    this.text.textContent = this.root.title = text;
  }

  take(events) {
    const begun = events.find(({ type }) => type === "run");
    if (begun) this.client = begun.client;
    const said = events.filter(({ type }) => type === "status").at(-1);
    if (said) this.#show(said.text);
  }

  async replay() {
    this.take(await this.read());
  }

  executed(output) {
    if (output.text) this.#show([output.text].flat().join(" "));
  }

  // What the node said for a run; `older`: also in place of what it said later.
  retrace({ text, run = "" }, { older = true } = {}) {
    if (!older && run <= this.run) return;
    this.run = run;
    this.#show(text);
  }

  fail(sentence) {
    this.#show(sentence, "cntlora-failed");
  }

  destroy() {}
}
