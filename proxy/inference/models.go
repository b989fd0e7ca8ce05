package inference

import (
	"encoding/json"
	"net/http"
	"strconv"

	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// modelObject is OpenAI's model object. created is 0: policy does not carry the date.
type modelObject struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

func newModelObject(name string) modelObject { return modelObject{name, "model", 0, "outrigger"} }

// anthropicModel is Anthropic's model object; created_at is the epoch for the same reason.
type anthropicModel struct {
	Type        string `json:"type"`
	ID          string `json:"id"`
	DisplayName string `json:"display_name"`
	CreatedAt   string `json:"created_at"`
}

func newAnthropicModel(name string) anthropicModel {
	return anthropicModel{"model", name, name, "1970-01-01T00:00:00Z"}
}

// serveModels answers GET /v1/models and /v1/models/{id} from the policy, below every base
// that shape.Models knows; ids may contain slashes. Anthropic's clients share the path with
// OpenAI's and are known by the version of the API that they must name.
func (c *call) serveModels() {
	id, family, _ := shape.Models(c.r.URL.Path)
	anthropic := family == shape.Anthropic || c.r.Header["Anthropic-Version"] != nil
	if anthropic {
		c.api = &shape.API{Family: shape.Anthropic, Operation: "models", Idempotent: true, Get: true, Meta: true}
	}
	if c.r.Method != http.MethodGet && c.r.Method != http.MethodHead {
		if c.passes() { // a model of the upstream's is deleted, or a browser asks
			c.passThrough(nil)
			return
		}
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
	if id == "" && anthropic {
		c.writeJSON(anthropicList(c.policy))
		return
	}
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
		if anthropic {
			c.writeJSON(newAnthropicModel(m.Name))
			return
		}
		c.writeJSON(newModelObject(m.Name))
		return
	}
	if c.passes() {
		c.passThrough(nil)
		return
	}
	c.refuse(modelNotFound(id))
}

// anthropicList is all models on one page.
func anthropicList(p *policy.Policy) any {
	list := struct {
		Data    []anthropicModel `json:"data"`
		HasMore bool             `json:"has_more"`
		FirstID *string          `json:"first_id"`
		LastID  *string          `json:"last_id"`
	}{Data: make([]anthropicModel, 0, len(p.Models))}
	for i := range p.Models {
		list.Data = append(list.Data, newAnthropicModel(p.Models[i].Name))
	}
	if n := len(list.Data); n > 0 {
		list.FirstID, list.LastID = &list.Data[0].ID, &list.Data[n-1].ID
	}
	return list
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
