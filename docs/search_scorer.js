// Ranks search results: pages on the internals come after those for users.
var Scorer = {
  // A result is [page, title, anchor, description, score, ...].
  score: function (result) {
    const page = result[0], score = result[4];
    const internals = /^(overhead|cpu|cuda|gpu|hopper|hopper_backward|adding-an-operation)$/;
    return internals.test(page) ? score - 1000 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
