// What the server keeps of runs.
import { api } from "../../scripts/api.js";

// All events of one node's run: the last one, or the one that `run` names.
export async function readRun(asked) {
  const answer = await api.fetchApi(`/cntlora/events?${new URLSearchParams(asked)}`);
  return answer.ok ? (await answer.json()).events : [];
}

// What the pack's locales say of the panel in the page's language.
export async function readWords(language) {
  const all = await api.getCustomNodesI18n().catch(() => ({}));
  return (all[language] ?? all[language.split("-")[0]])?.cntlora;
}

export function pictureAddress(folder, file) {
  const asked = new URLSearchParams({ type: "temp", subfolder: folder, filename: file });
  return api.apiURL(`/view?${asked}`);
}
