package identity

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

// keyFileEvery is how often a key file is read again. It is a few hundred bytes; reading
// it whole also sees a file that was replaced within the resolution of its times.
const keyFileEvery = 2 * time.Second

// KeyFileOptions configure OpenKeyFile. Zero values mean the defaults.
type KeyFileOptions struct {
	Every   time.Duration // between two looks [2 s]
	Changed func(*Keys)   // called by Run after new keys are in use; nil = nobody
	Logger  *slog.Logger  // [discarded]
	Meter   metric.Meter  // [none]
}

// KeyFile is a key file that is read again while the process runs, so that keys rotate
// without a restart: Keys returns those of the last good content. A file that is gone,
// cannot be read or holds no keys changes nothing: the keys in use stay, the first
// failure of each kind is logged, and every look that failed is counted in
//
//	outrigger.token_keys.failures  {look}    the key file could not be used
//	outrigger.token_keys.reloads   {reload}  other keys came into use
//
// Methods may be called concurrently; Run once.
type KeyFile struct {
	path              string
	o                 KeyFileOptions
	keys              atomic.Pointer[Keys]
	failures, reloads metric.Int64Counter
	told              string // the last failure logged; of Run alone
}

// OpenKeyFile reads the file and starts nothing. Errors are those of LoadKeys.
func OpenKeyFile(path string, o KeyFileOptions) (*KeyFile, error) {
	keys, err := LoadKeys(path)
	if err != nil {
		return nil, err
	}
	if o.Every <= 0 {
		o.Every = keyFileEvery
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Meter == nil {
		o.Meter = noop.Meter{}
	}
	f := &KeyFile{path: path, o: o}
	f.keys.Store(keys)
	if f.failures, err = o.Meter.Int64Counter("outrigger.token_keys.failures", metric.WithUnit("{look}"),
		metric.WithDescription("looks at the key file of session tokens that could not use it")); err != nil {
		return nil, err
	}
	f.reloads, err = o.Meter.Int64Counter("outrigger.token_keys.reloads", metric.WithUnit("{reload}"),
		metric.WithDescription("times other keys of session tokens came into use"))
	return f, err
}

// Keys returns the keys in use.
func (f *KeyFile) Keys() *Keys { return f.keys.Load() }

// Run looks at the file until ctx ends; it returns nil.
func (f *KeyFile) Run(ctx context.Context) error {
	tick := time.NewTicker(f.o.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			f.look(ctx)
		}
	}
}

func (f *KeyFile) look(ctx context.Context) {
	keys, err := LoadKeys(f.path)
	if err != nil {
		f.failures.Add(ctx, 1)
		if err.Error() != f.told {
			f.told = err.Error()
			f.o.Logger.Error("the token key file cannot be used; the keys read before stay in use", "error", err)
		}
		return
	}
	f.told = ""
	if keys.Same(f.keys.Load()) {
		return
	}
	f.keys.Store(keys)
	f.reloads.Add(ctx, 1)
	f.o.Logger.Info("session tokens are signed with the key file's new keys", "keys", keys)
	if f.o.Changed != nil {
		f.o.Changed(keys)
	}
}
