// Browsers start no Worker on a page that was opened from the file system. There, a hidden frame takes its place, so that
// the search works. The frame runs the worker's script; messages go both ways as between a page and a Worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      this.scope = this.frame.contentWindow;
      this.scope.postMessage = (data) => this.receive(data);
      this.scope.importScripts = (...scripts) =>
        scripts.reduce((before, one) => before.then(() => this.load(one)), Promise.resolve());
      this.load(script).then(() => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      });
    }

    load(script) {
      const element = this.scope.document.createElement("script");
      element.src = new URL(script, location.href);
      return new Promise((resolve, reject) => {
        element.onload = resolve;
        element.onerror = reject;
        this.scope.document.body.appendChild(element);
      });
    }

    postMessage(data) {
      if (!this.ready) this.waiting.push(data);
      else this.scope.dispatchEvent(new MessageEvent("message", { data }));
    }

    receive(data) {
      const event = new MessageEvent("message", { data });
      if (this.onmessage) this.onmessage(event);
      this.dispatchEvent(event);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
