// Figures, the theme, and sorting. `draw` is vega-embed.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const wear = () => { root.dataset.theme = dark.matches ? "dark" : "light"; };
  wear();
  dark.addEventListener("change", wear);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });

  // Vega-Lite cannot ask for Vega's layout of labels, so it is added to what Vega-Lite is compiled to.
  const anchors = ["right", "left", "top-right", "bottom-right", "top-left", "bottom-left", "top", "bottom"];
  const distances = [7, 16, 26, 38, 52, 70]; // a label without any room is not drawn
  const apart = (vega) => {
    const labels = vega.marks.find((mark) => mark.name === "labels_marks");
    if (labels) {
      labels.from = { data: "points_marks" };
      labels.encode = { update: { text: { field: "datum.method" }, fill: { value: "var(--ink)" }, fontSize: { value: 12 } } };
      labels.transform = [{
        type: "label", size: { signal: "[max(width, 1), height]" },
        avoidMarks: vega.marks.map((mark) => mark.name).filter((name) => /^(whiskers|front)_marks$/.test(name)),
        anchor: distances.flatMap(() => anchors), offset: distances.flatMap((far) => anchors.map(() => far)),
      }];
    }
    return vega;
  };
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const options = { renderer: "svg", actions: false, patch: apart, tooltip: { theme: "custom" } };
  const drawn = [...document.querySelectorAll(".plot")].map((plot) => draw(plot, specs[plot.dataset.spec], options));
  Promise.all(drawn).then(() => { root.dataset.drawn = drawn.length; });

  // numbers as numbers, text as text, what is missing last; a second click turns the order round
  const sort = (table, column, head) => {
    const down = head.getAttribute("aria-sort") === "none" ? column > 0 : head.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[column].dataset.sort;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return down ? -order : order;
    };
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  };
  for (const table of document.querySelectorAll("table.sortable"))
    [...table.tHead.rows[0].cells].forEach((head, column) =>
      head.querySelector("button").addEventListener("click", () => sort(table, column, head)));

  // paper has no closed parts
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
