(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)").matches;
  const touched = matchMedia("(pointer: coarse)").matches;
  const place = (id) => document.getElementById("plot-" + id);
  const scaled = (trace) => trace.meta && trace.meta.dark;

  // Only heatmaps change with the scheme: their lowest score is close to the colour of the page.
  const dressed = (trace) => {
    const made = { ...trace };
    if (scaled(trace) && dark.matches) made.colorscale = trace.meta.dark;
    if (scaled(trace) && narrow) {
      made.showscale = false;
      made.textfont = { size: 10 };
    }
    return made;
  };

  const draw = (id) => {
    const { data, layout } = figures[id];
    const fitted = { ...layout };
    if (touched) fitted.dragmode = false; // a finger scrolls the page
    if (narrow) fitted.margin = { ...layout.margin, r: Math.min(layout.margin.r, 32) };
    const config = { responsive: true, displayModeBar: false };
    return Plotly.react(place(id), data.map(dressed), fitted, config);
  };

  const drawn = Object.keys(figures).map((id) =>
    draw(id).catch((error) => {
      place(id).textContent = "This plot could not be drawn: " + error;
      console.error(error);
    }),
  );
  Promise.all(drawn).then(() => document.documentElement.setAttribute("data-drawn", ""));

  dark.addEventListener("change", () =>
    Object.keys(figures).filter((id) => figures[id].data.some(scaled)).forEach(draw),
  );
})();
