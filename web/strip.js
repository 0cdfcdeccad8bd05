// The samples of a run, a row for each step in their order, so that equal seeds stand below each
// other; a click shows a row large.
import { make, scrolls } from "./dom.js";
import { say } from "./say.js";

const NEAR_THE_END = 40; // px

const what = ({ step, kept }) => (
  kept ? say("Samples at step {step}, the weights kept", { step })
    : say("Samples at step {step}", { step }));

export class Strip {
  constructor(address) {
    Object.assign(this, { address, abort: new AbortController(), drawn: "", rows: new Map() });
    this.root = make("div", "cntlora-strip", { role: "group", "aria-label": say("Samples") });
    scrolls(this.root);
  }

  show({ folder, samples, kept }) {
    const inOrder = [...new Map(samples.map((sample) => [sample.step, sample])).values()]
      .sort((a, b) => a.step - b.step)
      .map(({ step, file }) => ({ step, file, kept: step === kept }));
    const key = JSON.stringify([folder, inOrder]);
    if (key === this.drawn) return;
    this.drawn = key;
    const { scrollTop, scrollHeight, clientHeight } = this.root;
    this.follows = scrollTop + clientHeight >= scrollHeight - NEAR_THE_END;
    const before = this.rows;
    this.rows = new Map(inOrder.map((sample) => this.#row(folder, sample)));
    for (const [source, { button }] of before) if (!this.rows.has(source)) button.remove();
    // One who looks at a row, or has the keyboard on it, keeps it: only what is new is put in.
    [...this.rows.values()].forEach(({ button }, at) => {
      const there = this.root.children[at];
      if (there !== button) this.root.insertBefore(button, there ?? null);
    });
  }

  // The one that is there already, said anew, by its address.
  #row(folder, sample) {
    const source = this.address(folder, sample.file);
    const row = this.rows.get(source) ?? this.#button(source, sample);
    const { button, image, text } = row;
    row.says = what(sample);
    image.alt = row.says;
    text.textContent = sample.kept ? say("step {step} · kept", sample) : say("step {step}", sample);
    button.setAttribute("aria-label", say("{samples}, enlarge", { samples: row.says }));
    button.classList.toggle("cntlora-kept", sample.kept);
    if (sample.kept) this.root.scrollTop = button.offsetTop;
    return [source, row];
  }

  #button(source, { step }) {
    const image = make("img", "", { src: source });
    const text = make("span", "cntlora-step");
    const attributes = { type: "button", "data-step": step };
    const button = make("button", "cntlora-sample", attributes, image, text);
    const row = { button, image, text, says: "" };
    const { signal } = this.abort;
    button.addEventListener("click", () => enlarge(source, row.says), { signal });
    // The kept one, or else the newest, comes into sight, unless somebody looks at another.
    image.addEventListener("load", () => {
      const kept = this.root.querySelector(".cntlora-kept");
      if (kept) this.root.scrollTop = kept.offsetTop;
      else if (this.follows) this.root.scrollTop = this.root.scrollHeight;
    }, { signal });
    return row;
  }

  destroy() {
    this.abort.abort();
  }
}

function enlarge(source, text) {
  const image = make("img", "", { src: source, alt: text });
  const close = make("button", "cntlora-close", { type: "button" }, say("Close"));
  const dialog = make("dialog", "cntlora-dialog", { "aria-label": text }, image, close);
  close.addEventListener("click", () => dialog.close());
  image.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("keydown", (e) => { // ComfyUI's shortcuts are for the graph behind
    e.stopPropagation();
    if (e.key === "Escape") dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
  close.focus();
}
