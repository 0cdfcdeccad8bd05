// The panel's words in the page's language. An English sentence is its own key: what the table
// (locales/words.json) does not know stays English.
let words = {};

export function useWords(table) {
  words = table ?? {};
}

// `{name}` in the sentence is one of `values`.
export function say(sentence, values = {}) {
  return (words[sentence] ?? sentence).replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);
}
