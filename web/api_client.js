// What the server keeps of runs.
import { api } from "../../scripts/api.js";

// All events of one node's run: the last one, or the one that `run` names; none where it is gone.
export async function readRun(asked) {
  const answer = await api.fetchApi(`/cntlora/events?${new URLSearchParams(asked)}`);
  if (!answer.ok) throw new Error(`/cntlora/events: ${answer.status}`);
  return (await answer.json()).events;
}

// The workflow that a prompt at work was queued from; undefined where that is not known.
export async function readWorkflow(prompt) {
  try {
    const { queue_running: running } = await (await api.fetchApi("/queue")).json();
    const [, , , extra] = running.find(([, id]) => id === prompt) ?? [];
    return extra?.extra_pnginfo?.workflow?.id;
  } catch {
    return undefined;
  }
}

// What the pack's locales say of the panel in the page's language.
export async function readWords(language) {
  const all = await api.getCustomNodesI18n().catch(() => ({}));
  return all[language]?.cntlora ?? all[language.split("-")[0]]?.cntlora; // another pack may have it
}

export function pictureAddress(folder, file) {
  const asked = new URLSearchParams({ type: "temp", subfolder: folder, filename: file });
  return api.apiURL(`/view?${asked}`);
}
