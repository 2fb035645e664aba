"use strict";
// Sorting: numbers by data-sort, words by the locale; cells without a value stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const first = [...body.rows];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const order = { none: "ascending", ascending: "descending", descending: "none" }[
        head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const numeric = head.classList.contains("n") || first.some((r) => r.cells[column].dataset.sort);
      const key = (row) => {
        const cell = row.cells[column];
        if (!numeric) return cell.dataset.word || cell.textContent.trim();
        return cell.dataset.sort === undefined ? null : Number(cell.dataset.sort);
      };
      const rows = order === "none" ? first : [...first].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
      });
      body.append(...rows);
    });
  });
}
// The gallery's filters.
const selects = [...document.querySelectorAll("select[data-filter]")];
const cards = [...document.querySelectorAll(".card")];
function filter() {
  let shown = 0;
  for (const card of cards) {
    const wanted = selects.every((s) => !s.value || card.dataset[s.dataset.filter] === s.value);
    card.hidden = !wanted;
    shown += wanted;
  }
  document.getElementById("shown").textContent = shown ? `${shown} shown` : "none shown";
}
selects.forEach((select) => select.addEventListener("change", filter));
// Paper has no buttons: everything is open in print, and as before afterwards.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((one) => { one.open = true; });
});
addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }));
