// The samples of a run, a row for each step in their order, so that equal seeds stand below each
// other; a click shows a row large.
import { make, scrolls } from "./dom.js";
import { say } from "./say.js";

const what = ({ step, kept }) => (
  kept ? say("Samples at step {step}, the weights kept", { step })
    : say("Samples at step {step}", { step }));

export class Strip {
  constructor(address) {
    Object.assign(this, { address, abort: new AbortController(), drawn: "" });
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
    this.root.replaceChildren(...inOrder.map((sample) => this.#button(folder, sample)));
  }

  #button(folder, sample) {
    const source = this.address(folder, sample.file);
    const image = make("img", "", { src: source, alt: what(sample) });
    const text = sample.kept ? say("step {step} · kept", sample) : say("step {step}", sample);
    const label = say("{samples}, enlarge", { samples: what(sample) });
    const button = make(
      "button",
      `cntlora-sample${sample.kept ? " cntlora-kept" : ""}`,
      { type: "button", "aria-label": label, "data-step": sample.step },
      image,
      make("span", "cntlora-step", {}, text),
    );
    const { signal } = this.abort;
    button.addEventListener("click", () => enlarge(source, what(sample)), { signal });
    // The kept one, or else the newest, comes into sight.
    image.addEventListener("load", () => {
      const kept = this.root.querySelector(".cntlora-kept");
      this.root.scrollTop = kept ? kept.offsetTop : this.root.scrollHeight;
    }, { signal });
    return button;
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
