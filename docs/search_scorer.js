// Ranks search results: pages on the internals come after those for users.
var Scorer = {
  score: function (result) {
    var page = result[0], score = result[5];
    var inside = /^(cpu|cuda|hopper|hopper_backward|overhead|gpu|adding-an-operation)$/;
    return inside.test(page) ? score - 1000 : score;
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
