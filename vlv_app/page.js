// What the page does in the browser. Each picture input, tab and button calls one of these functions.
window.vlv = (() => {
  const kept = {
    // sessionStorage belongs to one window and lasts until that is closed. Browsers may forbid it.
    get(key) {
      try { return JSON.parse(sessionStorage.getItem(`vlv.${key}`)); } catch { return null; }
    },
    set(key, value) {
      try { sessionStorage.setItem(`vlv.${key}`, JSON.stringify(value)); } catch { /* not kept */ }
    },
  };
  const asked = new URLSearchParams(location.search);
  const before = {};  // as it was before this page: its own fields, still empty, are kept soon

  // Another model may have fewer queries and other styles, so each has fields of its own.
  const fieldsBefore = (tab, model) => (before[`${model}.${tab}`] ??= kept.get(`fields.${model}.${tab}`) ?? {});

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in made && name !== "list") made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  // ---- picture inputs ----------------------------------------------------------------------------------------

  let pasteTarget = null;  // the input that a pasted picture goes to

  function picture(options, root, props, trigger, server, upload) {
    const box = root.querySelector(".picture-input");
    const heading = element("h2", { className: "field", id: `field-${options.key}` }, options.field);
    const image = element("img", { hidden: true });
    const hint = element("p", {}, options.hint);
    const drop = element("div", { className: "drop" }, image, hint);
    const input = element("input", { type: "file", accept: "image/*,.heic,.heif,.avif,.jxl,.tif,.tiff" });
    const choose = element("label", { className: "button" }, "Choose a file", input);
    const camera = element("button", { type: "button", className: "button" }, "Camera");
    const remove = element("button", { type: "button", className: "button", hidden: true }, "Remove");
    for (const control of [input, camera, remove]) control.setAttribute("aria-describedby", heading.id);
    const note = element("p", { className: "note", role: "status" });
    const error = element("p", { className: "error", role: "alert" });
    const examples = element("div", { className: "examples", role: "group", "aria-label": "Examples" });
    options.examples.forEach((source, number) => {
      const thumbnail = element("img", { src: source, alt: "" });
      const button = element("button", { type: "button", "aria-label": `Example ${number + 1}` }, thumbnail);
      button.onclick = () => take(() => server.example(number));
      examples.append(button);
    });
    box.setAttribute("role", "group");
    box.setAttribute("aria-labelledby", heading.id);
    box.append(heading, drop, element("div", { className: "bar" }, choose, camera, remove), note, error, examples);

    let turn = 0;  // the answers about an earlier picture come too late

    function show(value, sentence = "") {
      image.hidden = remove.hidden = !value;
      hint.hidden = Boolean(value);
      error.textContent = sentence;
      note.textContent = value ? value.name : "";
      if (value) {
        image.src = value.url;
        image.alt = `${options.field}: ${value.name}`;
        image.className = Math.max(value.width, value.height) <= 128 ? "few-pixels" : "";
      } else {
        image.removeAttribute("src");
      }
      props.value = value;
      kept.set(options.key, value && { id: value.id, name: value.name });
    }

    // `find` gives the server's answer: what it shows of a picture, or an error. Whatever was made of the picture
    // before goes at once; `isSame`: the page is loaded again, with the picture that it had.
    async function take(find, name = "", isSame = false) {
      const mine = ++turn;
      if (!isSame) {
        show(null);
        trigger("input");
      }
      note.textContent = "Reading the picture …";
      let answer;
      try { answer = await find(); } catch { answer = { error: `${options.field}: the server cannot be reached.` }; }
      if (mine !== turn) return;
      show(answer.id ? { name, ...answer } : null, answer.error);
      if (isSame && !answer.id) trigger("input");
      if (answer.id) document.dispatchEvent(new CustomEvent("vlv:picture", { detail: options.key }));
    }

    function takeFile(file) {
      if (!file) return;
      if (file.size > options.megabytes * 1e6) {
        turn++;
        show(null, `${options.field}, ${file.name}: the file has ${Math.ceil(file.size / 1e6)} MB, and `
          + `${options.megabytes} MB is the maximum file size: make it smaller first.`);
        trigger("input");
        return;
      }
      take(async () => {
        const { path } = await upload(file);
        return server.look(path);
      }, file.name);
    }

    input.onchange = () => { takeFile(input.files[0]); input.value = ""; };
    remove.onclick = () => { turn++; show(null); trigger("input"); input.focus(); };
    camera.onclick = () => openCamera(camera, takeFile, (sentence) => { error.textContent = sentence; });
    if (!navigator.mediaDevices) camera.hidden = true;
    for (const kind of ["dragenter", "dragover"]) {
      box.addEventListener(kind, (event) => { event.preventDefault(); box.classList.add("over"); });
    }
    for (const kind of ["dragleave", "drop"]) box.addEventListener(kind, () => box.classList.remove("over"));
    box.addEventListener("drop", (event) => { event.preventDefault(); takeFile(event.dataTransfer.files[0]); });
    for (const kind of ["pointerenter", "focusin"]) box.addEventListener(kind, () => { pasteTarget = takeFile; });
    pasteTarget ??= takeFile;

    const named = asked.get(options.key);
    const earlier = named ? { id: named, name: named.split("/").pop() } : kept.get(options.key);
    if (earlier) {
      take(async () => {
        const answer = await server.look(earlier.id);
        return answer.error && !named ? { error: "" } : answer;  // a kept picture may be gone; nobody asked for it
      }, earlier.name, !named);
    }
  }

  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (file && pasteTarget) { event.preventDefault(); pasteTarget(file); }
  });

  async function openCamera(button, takeFile, fail) {
    let stream;
    try { stream = await navigator.mediaDevices.getUserMedia({ video: true }); } catch {
      fail("The browser gives no picture of a camera: allow it, or choose a file.");
      return;
    }
    const video = element("video", { autoplay: true, muted: true, playsInline: true, srcObject: stream });
    const shoot = element("button", { type: "button", className: "button" }, "Take the picture");
    const cancel = element("button", { type: "button", className: "button" }, "Cancel");
    const dialog = element("dialog", { "aria-label": "Camera" }, video,
      element("div", { className: "bar" }, shoot, cancel));
    dialog.onclose = () => {
      stream.getTracks().forEach((track) => track.stop());
      dialog.remove();
      button.focus();
    };
    cancel.onclick = () => dialog.close();
    shoot.onclick = () => {
      const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => takeFile(new File([blob], "camera.png", { type: "image/png" })));
      dialog.close();
    };
    document.body.append(dialog);
    dialog.showModal();
  }

  // ---- runs --------------------------------------------------------------------------------------------------

  const announcer = element("div", { className: "visually-hidden", role: "status" });

  function announce() {
    for (const said of document.querySelectorAll("[data-done]:not([data-said])")) {
      said.setAttribute("data-said", "");
      announcer.textContent = said.textContent;
    }
  }

  // The ids of the statuses whose run was stopped. A click is noted at once, because what a cancelled run has already
  // sent, Gradio's own answer to the cancelling and ours come in any order.
  const stoppedRuns = new Set();

  document.addEventListener("click", (event) => {
    if (!event.target.closest("button.stop")) return;
    for (const status of document.querySelectorAll(".status:has(progress)")) {
      if (status.offsetParent) stoppedRuns.add(status.id);
    }
  }, true);

  function started(id) {
    stoppedRuns.delete(id);
    // The result lies below the fold of a phone.
    requestAnimationFrame(() => {
      const shown = [...document.querySelectorAll(".status:has(progress)")].find((each) => each.offsetParent);
      const place = shown?.getBoundingClientRect();
      if (place && (place.top < 0 || place.top > innerHeight * 0.6)) {
        const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
        scrollBy({ top: place.top - 12, behavior: smooth ? "smooth" : "auto" });
      }
    });
    return '<p>Waiting for its turn</p><progress aria-label="Waiting for its turn"></progress>';
  }

  const stopped = (id, status) => (stoppedRuns.has(id) ? "<p data-done>Stopped.</p>" : status);

  const failed = (id, values, cleared) =>
    stoppedRuns.has(id) ? [...values.slice(0, -1), stopped(id)] : cleared;

  document.addEventListener("input", (event) => {
    if (event.target.matches(".comparison input")) {
      event.target.closest(".comparison").style.setProperty("--border", `${event.target.value}%`);
    }
  });

  document.addEventListener("click", (event) => {
    const caption = event.target.closest(".captions button")?.previousElementSibling;
    if (!caption) return;
    const box = document.querySelector("#caption-text textarea");
    box.value = caption.textContent;
    box.dispatchEvent(new Event("input", { bubbles: true }));
    box.focus();
  });

  async function copy(text, id) {
    const box = document.querySelector(`#${id} textarea`);
    try {
      await navigator.clipboard.writeText(text);
      announcer.textContent = "Copied.";
    } catch {  // not over plain http to another machine: the visitor copies what is selected
      box.focus();
      box.select();
    }
  }

  function saveText(picture, text) {
    const name = (picture?.name ?? "caption").replace(/\.[^.]*$/, "");
    const url = URL.createObjectURL(new Blob([`${text}\n`], { type: "text/plain" }));
    element("a", { href: url, download: `${name}.txt` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  // ---- what the page keeps, and what its address says --------------------------------------------------------

  function link(tab, picture, names, values) {
    if (!picture) return "<p>Choose a picture first.</p>";
    const words = new URLSearchParams({ tab, image: picture.id });
    const isEmpty = (value) => [null, undefined, "", false].includes(value);
    names.forEach((name, place) => { if (!isEmpty(values[place])) words.set(name, values[place]); });
    const address = `${location.origin}${location.pathname}?${words}`;
    navigator.clipboard?.writeText(address).catch(() => {});
    const shown = element("a", { href: address }, address).outerHTML;
    return `<p>It opens this picture with these settings, while the server keeps the picture (a day):</p><p>${shown}</p>`;
  }

  // A value in the address, as a field of this type has it.
  function readAs(type, text) {
    if (type === "number") return Number(text);
    return type === "boolean" ? text === "true" : text;
  }

  // The picture that a link names may be shown before or after Gradio has built the rest of the page.
  const isShown = new Promise((resolve) => {
    document.addEventListener("vlv:picture", ({ detail }) => { if (detail === "image") resolve(); });
  });

  function restore(tab, model, names, values) {
    const here = asked.get("tab") === tab;
    // A link to a result leaves out what is empty.
    const fields = here && asked.has("image") ? {} : fieldsBefore(tab, model);
    const samePicture = !asked.has("image") && kept.get("image");
    return values.map((value, place) => {
      const name = names[place];
      if (name === "caption" && !samePicture) return "";  // it is that of another picture
      if (here && asked.has(name)) return readAs(typeof value, asked.get(name));
      return fields[name] ?? value;
    });
  }

  function keep(tab, model, names, values) {
    fieldsBefore(tab, model);
    kept.set(`fields.${model}.${tab}`, Object.fromEntries(names.map((name, place) => [name, values[place]])));
  }

  function tabSelected(name) {
    const words = new URLSearchParams(location.search);
    words.set("tab", name);
    history.replaceState(null, "", `?${words}`);
  }

  const tabButton = (name) => [...document.querySelectorAll("[role=tab], .overflow-dropdown button")]
    .find((tab) => tab.textContent.trim() === name);

  function loaded() {
    document.documentElement.lang = "en";
    document.body.append(announcer);
    new MutationObserver(announce).observe(document.body, { childList: true, subtree: true });
    const tab = asked.get("tab");
    if (tab) tabButton(tab)?.click();
  }

  const isClosed = (name) => tabButton(name)?.getAttribute("aria-selected") === "false";
  const visibleRunButton = () => [...document.querySelectorAll("button.run")].find((each) => each.offsetParent);

  // The fields of a tab have their values. Where the page was opened by a link to a result, make it again.
  async function restored(tab) {
    if (asked.get("tab") !== tab || !asked.has("image")) return;
    await isShown;
    while (isClosed(tab) || !visibleRunButton()) await new Promise(requestAnimationFrame);
    visibleRunButton().click();
  }

  return {
    picture, started, stopped, failed, copy, saveText, link, restore, restored, keep, tabSelected, loaded, element,
  };
})();
