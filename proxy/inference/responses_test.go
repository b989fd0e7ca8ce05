package inference

import (
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/responses"
)

func readResponses(t *testing.T, c openai.Client) (text string, err error) {
	s := c.Responses.NewStreaming(t.Context(), responses.ResponseNewParams{Model: "gpt", Input: responses.ResponseNewParamsInputUnion{OfString: openai.String("x")}})
	for s.Next() {
		text += s.Current().Delta
	}
	return text, s.Err()
}
