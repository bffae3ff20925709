// The Collection tab: it asks the server for pages of rows, and sends each change at once.
function collection(options, root, server, upload) {
  const KEY = "vlv.collection";  // in localStorage, so that all windows show the same collection
  const $ = (selector) => box.querySelector(selector);
  const box = root.querySelector(".collection");
  const escaped = (text) => { const span = document.createElement("span"); span.textContent = text; return span.innerHTML; };
  const select = (id, label, values) => `<label>${label}<select id="${id}">${
    values.map((value) => `<option>${escaped(value)}</option>`).join("")}</select></label>`;
  const field = (id, label, type = "text", value = "") =>
    `<label>${label}<input id="${id}" type="${type}" value="${value}"></label>`;
  const button = (id, label, kind = "") => `<button type="button" id="${id}" class="${kind}">${label}</button>`;

  box.innerHTML = `
    <section aria-label="Open">
      <div class="bar">
        <label class="button">Choose images or a zip<input type="file" id="c-files" multiple
          accept="image/*,.zip,.txt,.jsonl,.heic,.heif,.avif,.jxl,.tif,.tiff"></label>
        <label class="button">Choose a folder<input type="file" id="c-folder" webkitdirectory></label>
      </div>
      ${options.is_local ? `<div class="bar">${field("c-path", "Folder or captions file (.jsonl) of this computer")}
        ${button("c-open", "Open")}</div>` : ""}
      <p class="note">Choosing files copies them into a collection of the server. ${options.is_local
        ? "A folder of this computer is used where it is." : ""} All changes are kept there at once.</p>
    </section>
    <p id="c-said" role="status"></p>
    <p id="c-error" class="error" role="alert"></p>
    <div id="c-opened" hidden>
      <section aria-label="Captions">
        <p id="c-about"></p>
        <div class="bar">
          ${field("c-prefix", "Beginning of all captions")}
          ${field("c-max_new_tokens", options.settings.max_new_tokens.label, "number", options.settings.max_new_tokens.value)}
          ${field("c-num_beams", options.settings.num_beams.label, "number", options.settings.num_beams.value)}
          ${options.styles ? `${select("c-style", "Style", ["", ...options.styles])}${field("c-prompt", "Prompt")}` : ""}
          ${field("c-words", "Number of words, such as 20-40")}
          ${button("c-caption", "Caption all", "main")}${button("c-stop", "Stop")}
        </div>
        <p id="c-run"></p><progress id="c-progress" aria-label="Captions of this run" hidden></progress>
      </section>
      <section aria-label="Find and change">
        <div class="bar">${field("c-search", "Search", "search")}${select("c-show", "Show", options.show)}
          ${select("c-order", "Order", options.orders)}</div>
        <details><summary>Change all captions that are found</summary>
          <div class="bar">${field("c-find", "Find")}${field("c-by", "Replace by")}${button("c-replace", "Replace")}</div>
          <div class="bar">${field("c-before", "Put before")}${field("c-behind", "Put behind")}
            ${field("c-triggers", "Trigger words, with commas")}${button("c-add", "Add")}</div>
          <div class="bar">${button("c-undo", "Undo the last change of all")}</div>
        </details>
      </section>
      <section aria-label="Images">
        <p class="note">Alt with ↓ or ↑ moves to the next or previous caption, Alt with K keeps or skips its image.</p>
        <ol id="c-rows"></ol>
        <div class="bar">${button("c-previous", "Previous page")}<span id="c-page"></span>${button("c-next", "Next page")}
          ${field("c-goto", "Go to page", "number")}</div>
      </section>
      <section aria-label="Save">
        <div class="bar">${button("c-txt", "Save .txt files beside the images")}
          ${button("c-metadata", "Save metadata.jsonl")}${button("c-zip", "Download a zip")}<span id="c-download"></span></div>
        <div class="bar">${button("c-close", "Close the collection")}${button("c-remove", "Delete the collection")}</div>
      </section>
    </div>`;

  let id = null, page = 0, pages = 1, shown = new Map(), turn = 0, counts = null;

  // ---- the server ----

  async function ask(method, request = {}) {
    let answer;
    try { answer = await server[method](request); } catch { answer = { error: "The server cannot be reached: try it again." }; }
    $("#c-error").textContent = answer.error ?? "";
    if (answer.sentence) $("#c-said").textContent = answer.sentence;
    return answer;
  }

  const query = () => ({ id, search: $("#c-search").value, show: $("#c-show").value, order: $("#c-order").value });

  function opened(answer) {
    if (!answer.id) return;
    id = answer.id;
    try { localStorage.setItem(KEY, id); } catch { /* not kept */ }
    $("#c-opened").hidden = false;
    $("#c-txt").hidden = !answer.path;
    $("#c-remove").hidden = Boolean(answer.path);
    about(answer);
    load();
  }

  function about(answer) {
    if (!answer.counts) return;
    const { all, failed, skipped } = answer.counts;
    const captioned = answer.counts["with caption"];
    const parts = [`${all} images`, `${captioned} with a caption`];
    if (skipped) parts.push(`${skipped} skipped`);
    if (failed) parts.push(`${failed} failed`);
    $("#c-about").textContent = `${answer.path ? `${answer.path}: ` : ""}${parts.join(", ")}.`;
    $("#c-order").closest("label").hidden = false;
    [...$("#c-order").options].forEach((option) => {
      const score = options.scores.find((name) => option.value === `worst ${name} first`);
      option.hidden = Boolean(score) && !answer.counts[`with ${score}`];
    });
    const run = answer.run;
    $("#c-run").textContent = run ? run.sentence : "";
    $("#c-progress").hidden = !run || run.ended;
    if (run && !run.ended) { $("#c-progress").max = run.total || 1; $("#c-progress").value = run.done; }
    const changed = counts !== null && captioned !== counts;
    counts = captioned;
    if (changed) load();
  }

  function close() {
    id = null; counts = null; shown.clear();
    try { localStorage.removeItem(KEY); } catch { /* nothing was kept */ }
    $("#c-opened").hidden = true;
    $("#c-rows").replaceChildren();
  }

  // ---- rows ----

  async function load(to = page, focus = null) {
    if (!id) return;
    const mine = ++turn;
    const answer = await ask("rows", { ...query(), page: to });
    if (mine !== turn || !answer.rows) return;
    ({ page, pages } = answer);
    $("#c-page").textContent = `Page ${page + 1} of ${pages}, ${answer.total} images`;
    $("#c-previous").disabled = page === 0;
    $("#c-next").disabled = page + 1 >= pages;
    const same = answer.rows.length === shown.size && answer.rows.every((row) => shown.has(row.number))
      && [...shown.keys()].every((number, place) => number === answer.rows[place].number);
    if (same) answer.rows.forEach((row) => refresh(row));
    else draw(answer.rows, mine);
    if (focus) [...box.querySelectorAll("#c-rows textarea")].at(focus === "first" ? 0 : -1)?.focus();
  }

  function draw(rows, mine) {
    shown = new Map();
    $("#c-rows").replaceChildren(...rows.map((row) => {
      const item = document.createElement("li");
      item.innerHTML = `<img alt="" width="128" height="128"><div class="words"><label><span class="name"></span>
        <textarea rows="3"></textarea></label><p class="note" role="status"></p></div>
        <label class="keep"><input type="checkbox"> Keep</label>`;
      item.querySelector(".name").textContent = row.name;
      const image = item.querySelector("img");
      image.alt = row.name;
      image.onload = () => { image.className = image.naturalWidth <= 128 ? "few-pixels" : ""; };
      const text = item.querySelector("textarea"), keep = item.querySelector("input");
      shown.set(row.number, { row, item, text, keep });
      text.oninput = () => { clearTimeout(text.timer); text.timer = setTimeout(() => send(row.number), 400); };
      text.onblur = () => { clearTimeout(text.timer); send(row.number); };
      text.onkeydown = (event) => keyPressed(event, row.number);
      keep.onchange = () => { ask("set_keep", { id, number: row.number, keep: keep.checked }).then(ask_about); };
      refresh(row);
      return item;
    }));
    pictures(rows, mine);
  }

  function refresh(row) {
    const it = shown.get(row.number);
    const edited = it.text.value !== it.row.text && it.drawn;
    if (!edited) { it.row = row; it.text.value = row.text; }
    it.drawn = true;
    it.keep.checked = Boolean(row.keep);
    const scores = options.scores.filter((name) => row[name] !== null)
      .map((name) => `${name[0].toUpperCase()}${name.slice(1)} ${row[name].toFixed(3)}. `);
    if (!it.note) it.item.querySelector(".note").textContent = scores.join("") + (row.error ?? "");
  }

  // Four at a time: the page stays fluid, and the server has threads for others.
  async function pictures(rows, mine) {
    const waiting = [...rows];
    const work = async () => {
      for (let row = waiting.shift(); row && mine === turn; row = waiting.shift()) {
        const answer = await server.thumbnail({ id, number: row.number }).catch(() => ({}));
        if (answer.url && shown.get(row.number)) shown.get(row.number).item.querySelector("img").src = answer.url;
      }
    };
    await Promise.all([1, 2, 3, 4].map(work));
  }

  async function send(number) {
    const it = shown.get(number);
    if (!it || it.sending || it.text.value === it.row.text) return;
    it.sending = true;
    const text = it.text.value;
    const answer = await ask("edit", { id, number, text, version: it.row.version });
    it.sending = false;
    if (answer.row) {
      it.row = answer.row;
      note(it, "Kept.");
      if (it.text.value !== text) send(number);
      ask_about();
    } else if (answer.conflict) {
      it.row = answer.conflict;
      note(it, `Another window has changed this caption to: “${answer.conflict.text}”. Yours is still in the box: `
        + "change it once more to keep yours.");
    } else {
      note(it, "Not kept: the server did not take it.");
    }
  }

  function note(it, words) {
    it.note = words;
    it.item.querySelector(".note").textContent = words;
  }

  function keyPressed(event, number) {
    if (!event.altKey) return;
    const numbers = [...shown.keys()], place = numbers.indexOf(number);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const next = place + (event.key === "ArrowDown" ? 1 : -1);
      if (shown.has(numbers[next])) shown.get(numbers[next]).text.focus();
      else if (next < 0 && page > 0) load(page - 1, "last");
      else if (next > 0 && page + 1 < pages) load(page + 1, "first");
    } else if (event.key.toLowerCase() === "k") {
      event.preventDefault();
      shown.get(number).keep.click();
    }
  }

  // ---- what the visitor does ----

  async function addFiles(list) {
    const files = [...list].filter((file) => file.size <= options.megabytes * 1e6);
    const large = list.length - files.length, sent = [], waiting = files.slice(0, options.most);
    const work = async () => {
      for (let file = waiting.shift(); file; file = waiting.shift()) {
        const name = file.webkitRelativePath.split("/").slice(1).join("/") || file.name;
        try { sent.push([(await upload(file)).path, name]); } catch { /* counted below */ }
        $("#c-said").textContent = `${sent.length} of ${files.length} files are uploaded.`;
      }
    };
    await Promise.all([1, 2, 3, 4].map(work));
    if (!sent.length) { $("#c-error").textContent = "No file was uploaded: choose images, or a zip of them."; return; }
    sent.sort(([, first], [, second]) => first.localeCompare(second));
    opened(await ask("add_files", { files: sent, id: $("#c-txt").hidden ? id : null }));
    const lost = files.length - sent.length;
    if (lost || large) $("#c-error").textContent = `${lost + large} files were not uploaded: they are too large, or the connection failed.`;
  }

  for (const name of ["files", "folder"]) {
    $(`#c-${name}`).onchange = (event) => { addFiles(event.target.files).then(() => { event.target.value = ""; }); };
  }
  const on = (name, work) => { const it = $(`#c-${name}`); if (it) it.onclick = work; };
  on("open", async () => opened(await ask("open_path", { path: $("#c-path").value })));
  on("caption", async () => about(await ask("caption", {
    id, prompt: $("#c-prompt")?.value || "", style: $("#c-style")?.value || "", words: $("#c-words").value,
    prefix: $("#c-prefix").value, max_new_tokens: $("#c-max_new_tokens").value, num_beams: $("#c-num_beams").value,
  })));
  on("stop", async () => about(await ask("stop", { id })));
  const found = () => { const { order, ...rest } = query(); return rest; };
  const changing = (method, request) => async () => {
    await Promise.all([...shown.keys()].map(send));
    const answer = await ask(method, { ...(method === "undo" ? { id } : found()), ...request() });
    shown.forEach((it) => { it.note = ""; });
    if (!answer.error) load();
  };
  on("replace", changing("replace", () => ({ find: $("#c-find").value, by: $("#c-by").value })));
  on("add", changing("add_words", () => ({
    before: $("#c-before").value, behind: $("#c-behind").value, triggers: $("#c-triggers").value,
  })));
  on("undo", changing("undo", () => ({})));
  on("previous", () => load(page - 1));
  on("next", () => load(page + 1));
  $("#c-goto").onchange = (event) => { load(Number(event.target.value) - 1); event.target.value = ""; };
  let typing;
  $("#c-search").oninput = () => { clearTimeout(typing); typing = setTimeout(() => load(0), 250); };
  for (const name of ["show", "order"]) $(`#c-${name}`).onchange = () => load(0);
  const saving = (kind) => async () => {
    await Promise.all([...shown.keys()].map(send));
    const answer = await ask("save", { id, kind });
    $("#c-download").replaceChildren();
    if (answer.url) {
      const link = document.createElement("a");
      Object.assign(link, { href: answer.url, download: answer.name, textContent: `Download ${answer.name}` });
      $("#c-download").append(link);
      link.click();
    }
  };
  on("txt", saving("txt"));
  on("metadata", saving("metadata.jsonl"));
  on("zip", saving("zip"));
  on("close", () => { close(); $("#c-said").textContent = "The collection is closed; its captions are kept."; });
  on("remove", async () => {
    if (!confirm("Delete this collection, its images and its captions on the server?")) return;
    const answer = await ask("remove", { id });
    if (!answer.error) close();
  });

  const ask_about = async () => { if (id) about(await server.about({ id }).catch(() => ({}))); };
  // While the tab is on show: the run's progress, and what other windows do. The server ends a run that nobody watches.
  setInterval(() => { if (id && !document.hidden) ask_about(); }, 1500);
  setInterval(() => { if (id && document.hidden) ask_about(); }, 20_000);
  addEventListener("focus", () => load());

  let before = null;
  try { before = localStorage.getItem(KEY); } catch { /* nothing is kept */ }
  if (before) ask("about", { id: before }).then((answer) => { if (answer.error) close(); else opened(answer); });
}
