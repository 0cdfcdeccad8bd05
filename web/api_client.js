// What the server keeps of runs.
import { api } from "../../scripts/api.js";

// All events of one node's run: the last one, or the one that `run` names.
export async function readRun(asked) {
  const answer = await api.fetchApi(`/cntlora/events?${new URLSearchParams(asked)}`);
  return answer.ok ? (await answer.json()).events : [];
}

export function pictureAddress(folder, file) {
  const asked = new URLSearchParams({ type: "temp", subfolder: folder, filename: file });
  return api.apiURL(`/view?${asked}`);
}
