package inference

import "net/http"

// Paths of the Open Inference Protocol that are about the server, which is the mesh.
const (
	serverPath      = "/v2"
	serverLivePath  = "/v2/health/live"
	serverReadyPath = "/v2/health/ready"
)

func isServerPath(path string) bool {
	return path == serverPath || path == serverLivePath || path == serverReadyPath
}

// serverName is who answers as the server of the Open Inference Protocol.
const serverName = "outrigger"

// serveServer answers for the server: it is live while the sidecar is, and ready once
// there is a policy (400 before, as the protocol has it). It claims no extensions: which
// there are is for the model behind a request to say.
func (c *call) serveServer() {
	if c.r.Method != http.MethodGet && c.r.Method != http.MethodHead {
		c.w.Header()["Allow"] = []string{"GET, HEAD"}
		c.refuse(apiError{status: http.StatusMethodNotAllowed, code: "method_not_allowed", message: c.r.URL.Path + " takes GET"})
		return
	}
	if c.h.o.Policy == nil && c.passes() {
		c.passThrough(nil)
		return
	}
	switch {
	case c.r.URL.Path == serverLivePath:
		c.writeJSON(map[string]bool{"live": true})
	case c.r.URL.Path == serverPath:
		c.writeJSON(map[string]any{"name": serverName, "version": "2", "extensions": []string{}})
	case c.policy != nil:
		c.writeJSON(map[string]bool{"ready": true})
	default:
		c.refuse(apiError{status: http.StatusBadRequest, code: "no_policy", retryAfter: overloadDelay,
			message: "the sidecar has no routing policy yet; it is waiting for the control plane"})
	}
}
