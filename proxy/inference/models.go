package inference

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
)

// modelObject is OpenAI's model object. created is 0: policy does not carry the date.
type modelObject struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

func newModelObject(name string) modelObject { return modelObject{name, "model", 0, "outrigger"} }

// serveModels answers GET /v1/models and /v1/models/{id} from the policy; ids may
// contain slashes.
func (c *call) serveModels() {
	if c.r.Method != http.MethodGet && c.r.Method != http.MethodHead {
		c.w.Header()["Allow"] = []string{"GET, HEAD"}
		c.refuse(apiError{status: http.StatusMethodNotAllowed, kind: invalidRequest, code: "method_not_allowed", message: c.r.URL.Path + " takes GET"})
		return
	}
	if c.h.o.Policy == nil && c.passes() {
		c.passThrough(nil)
		return
	}
	if c.policy == nil {
		c.route() // the same refusal as for a request
		return
	}
	id := strings.TrimPrefix(strings.TrimPrefix(c.r.URL.Path, modelsPath), "/")
	if id == "" {
		list := make([]modelObject, 0, len(c.policy.Models))
		for i := range c.policy.Models {
			list = append(list, newModelObject(c.policy.Models[i].Name))
		}
		c.writeJSON(struct {
			Object string        `json:"object"`
			Data   []modelObject `json:"data"`
		}{"list", list})
		return
	}
	if m := c.policy.Model(id); m != nil {
		c.writeJSON(newModelObject(m.Name))
		return
	}
	if c.passes() {
		c.passThrough(nil)
		return
	}
	c.refuse(modelNotFound(id))
}

func (c *call) writeJSON(v any) {
	b, err := json.Marshal(v)
	if err != nil {
		c.refuse(apiError{status: http.StatusInternalServerError, code: "internal", message: "internal error"})
		return
	}
	c.region = c.h.o.Region
	c.setHeaders()
	h := c.w.Header()
	h["Content-Type"] = []string{"application/json"}
	h["Content-Length"] = []string{strconv.Itoa(len(b))}
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(b)
}
