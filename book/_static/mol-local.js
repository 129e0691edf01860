// py3Dmol loads 3Dmol.js from a content delivery network unless $3Dmolpromise exists already.
// This promise loads the copy that the book brings along, the first time a viewer asks for it.
var $3Dmolpromise = (function (base) {
  var loading = null;
  return {
    then: function (resolve, reject) {
      loading = loading || new Promise(function (done, fail) {
        var script = document.createElement("script");
        script.src = base + "vendor/3dmol/3Dmol-min.js";
        script.onload = done;
        script.onerror = fail;
        document.head.appendChild(script);
      });
      return loading.then(resolve, reject);
    },
  };
})(document.currentScript.src.replace(/mol-local\.js.*$/, ""));
