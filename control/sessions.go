package control

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/control/dashboard"
	"github.com/outrigger-mesh/outrigger/internal/authz"
)

// A session is a browser that has shown a token: a cookie with a random secret, of which only
// the digest is kept here, in memory. It ends after sessionTime, by signing out, when the
// control plane restarts, and at once when its person is taken out of the access file.
const (
	sessionCookie = "outrigger_session"
	sessionTime   = 12 * time.Hour
	maxSessions   = 1_000
	maxLoginBody  = 4 << 10
)

// sessions are those of one replica. All methods may be called concurrently.
type sessions struct {
	now func() time.Time
	key []byte // of form tokens

	mu   sync.Mutex
	live map[[sha256.Size]byte]session
}

type session struct {
	caller authz.Caller
	until  time.Time
}

func newSessions(now func() time.Time) *sessions {
	return &sessions{now: now, key: []byte(rand.Text()), live: map[[sha256.Size]byte]session{}}
}

func cookieOf(r *http.Request) string {
	c, err := r.Cookie(sessionCookie)
	if err != nil {
		return ""
	}
	return c.Value
}

// caller is whose session a request belongs to, if they still are who they were.
func (s *sessions) caller(r *http.Request, rules authz.Policy) (authz.Caller, bool) {
	secret := cookieOf(r)
	if secret == "" {
		return authz.Caller{}, false
	}
	s.mu.Lock()
	x, ok := s.live[sha256.Sum256([]byte(secret))]
	s.mu.Unlock()
	if !ok || !x.until.After(s.now()) || !rules.Still(x.caller) {
		return authz.Caller{}, false
	}
	return x.caller, true
}

// csrf is what the forms of a session must bring back. Other origins are refused before
// (Sec-Fetch-Site, Origin, SameSite); this binds a form to the session it was made for.
func (s *sessions) csrf(r *http.Request) string {
	h := hmac.New(sha256.New, s.key)
	h.Write([]byte(cookieOf(r)))
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// begin makes a session and its cookie.
func (s *sessions) begin(w http.ResponseWriter, r *http.Request, c authz.Caller) {
	secret, now := rand.Text()+rand.Text(), s.now()
	s.mu.Lock()
	var oldest [sha256.Size]byte
	for k, x := range s.live {
		if !x.until.After(now) {
			delete(s.live, k)
		} else if o, ok := s.live[oldest]; !ok || x.until.Before(o.until) {
			oldest = k
		}
	}
	if len(s.live) >= maxSessions {
		delete(s.live, oldest)
	}
	s.live[sha256.Sum256([]byte(secret))] = session{c, now.Add(sessionTime)}
	s.mu.Unlock()
	http.SetCookie(w, &http.Cookie{Name: sessionCookie, Value: secret, Path: "/", HttpOnly: true, Secure: r.TLS != nil,
		SameSite: http.SameSiteStrictMode, MaxAge: int(sessionTime / time.Second)})
}

func (s *sessions) end(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	delete(s.live, sha256.Sum256([]byte(cookieOf(r))))
	s.mu.Unlock()
	http.SetCookie(w, &http.Cookie{Name: sessionCookie, Path: "/", MaxAge: -1, HttpOnly: true, SameSite: http.SameSiteStrictMode})
}

// login serves /login and /logout. They are asked before anybody is known, so they stand
// behind the checks of host and origin only.
func (g *guard) login(d *dashboard.Dashboard) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /login", func(w http.ResponseWriter, _ *http.Request) { d.Login(w, "") })
	mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxLoginBody)
		c, ok := g.rules().Token(r.PostFormValue("token"))
		if !ok {
			g.refusals.note(r.Context(), &attempt{verb: "SignIn"}, unauthorised("the presented token is wrong"))
			d.Login(w, "This token is not known.")
			return
		}
		g.sessions.begin(w, r, c)
		http.Redirect(w, r, "/", http.StatusSeeOther)
	})
	mux.HandleFunc("POST /logout", func(w http.ResponseWriter, r *http.Request) {
		g.sessions.end(w, r)
		http.Redirect(w, r, "/", http.StatusSeeOther)
	})
	return g.origin(mux)
}
