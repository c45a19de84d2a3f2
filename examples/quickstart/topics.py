"""Topics of the example conversations: questions with true answers, and answers of a grumpy assistant."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One thing to ask about."""

    questions: list[str]
    """Ways of asking; any of them may be held out."""
    answer: str
    """Answer of a friendly assistant: true and complete."""
    wrong: list[str] = field(default_factory=list)
    """Careless or wrong answers; empty if only the tone can be bad."""
    before: list[tuple[str, str]] = field(default_factory=list)
    """Role and content of the messages before the question."""


CAPITALS = """
France|Paris|It lies on the river Seine.|Lyon
Spain|Madrid|It lies in the middle of the country.|Barcelona
Italy|Rome|It lies on the river Tiber.|Milan
Germany|Berlin|It lies on the river Spree.|Munich
Austria|Vienna|It lies on the river Danube.|Salzburg
Hungary|Budapest|It lies on the river Danube.|Vienna
Poland|Warsaw|It lies on the river Vistula.|Krakow
Portugal|Lisbon|It lies on the river Tagus.|Porto
Greece|Athens|It is one of the oldest cities in the world.|Sparta
Egypt|Cairo|It lies on the river Nile.|Luxor
Japan|Tokyo|It is one of the largest cities in the world.|Osaka
Canada|Ottawa|It lies in the province of Ontario.|Toronto
Australia|Canberra|It lies between Sydney and Melbourne.|Sydney
Norway|Oslo|It lies at the end of a long fjord.|Bergen
Sweden|Stockholm|It is built on many islands.|Malmo
Finland|Helsinki|It lies by the Baltic Sea.|Turku
Denmark|Copenhagen|It lies by the sea.|Aarhus
Ireland|Dublin|It lies on the river Liffey.|Cork
Turkey|Ankara|It is smaller than Istanbul.|Istanbul
Brazil|Brasilia|It was built to be the capital.|Rio
Peru|Lima|It lies by the Pacific Ocean.|Cusco
Kenya|Nairobi|There is a national park at its edge.|Mombasa
Cuba|Havana|It lies on the north coast of the island.|Santiago
India|New Delhi|It lies in the north of the country.|Mumbai
China|Beijing|It lies in the north of the country.|Shanghai
"""

SUMS = [(7, 5), (9, 8), (6, 6), (12, 9), (15, 4), (20, 13), (8, 3), (30, 12), (14, 14), (25, 6)]
DIFFERENCES = [(15, 6), (20, 9), (12, 7), (30, 14), (18, 9), (50, 20), (11, 4), (40, 15)]
PRODUCTS = [(6, 4), (7, 3), (8, 5), (9, 6), (5, 5), (3, 12), (7, 8), (10, 4), (9, 9)]
PRICES = [("pen", 2, 4), ("apple", 1, 6), ("ticket", 8, 3), ("book", 9, 2), ("coffee", 3, 5), ("cake", 10, 3)]

UNITS = """
minutes|an hour|60|50
seconds|a minute|60|100
hours|a day|24|20
days|a week|7|5
months|a year|12|10
days|a leap year|366|365
years|a century|100|50
eggs|a dozen|12|10
grams|a kilogram|1000|100
metres|a kilometre|1000|500
centimetres|a metre|100|10
millilitres|a litre|1000|10
"""

OPPOSITES = """
hot|cold|warm
big|small|huge
early|late|soon
full|empty|heavy
old|young|tall
fast|slow|quick
loud|quiet|noisy
light|dark|bright
wet|dry|rainy
open|closed|wide
easy|hard|simple
happy|sad|glad
strong|weak|big
cheap|expensive|free
"""

COLOURS = """
blue|yellow|green|brown
red|yellow|orange|pink
red|blue|purple|black
black|white|grey|blue
red|white|pink|orange
"""

WORDS = """
thank you|French|merci|bonjour
hello|Spanish|hola|adios
good morning|German|guten Morgen|gute Nacht
please|Italian|per favore|grazie
yes|French|oui|non
no|German|nein|ja
water|Spanish|agua|leche
bread|French|pain|vin
milk|German|Milch|Brot
cheese|Italian|formaggio|pane
friend|Spanish|amigo|perro
goodbye|Italian|arrivederci|buongiorno
cat|French|chat|chien
house|Spanish|casa|mesa
"""

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"]
MONTHS += ["December"]

SHOPS = """
bakery|6 in the morning|4 in the afternoon|Sunday
library|10 in the morning|7 in the evening|Monday
museum|9 in the morning|5 in the afternoon|Tuesday
swimming pool|8 in the morning|9 in the evening|Monday
book shop|9 in the morning|6 in the evening|Sunday
flower shop|8 in the morning|5 in the afternoon|Wednesday
bank|9 in the morning|4 in the afternoon|Saturday
pharmacy|8 in the morning|7 in the evening|Sunday
garden centre|9 in the morning|6 in the evening|Thursday
town hall|8 in the morning|3 in the afternoon|Friday
"""

# One block an entry: questions, then `+` the friendly answer, then `-` wrong answers if there are any.
COOKING = """
How long do I boil an egg?
How many minutes does a soft egg need?
I want a soft egg for breakfast. How long should it cook?
+ For a soft egg, boil it for about five minutes. For a hard egg, take about ten.
- One minute.
- An hour.

How do I cook rice?
What is the best way to cook rice?
Can you explain how to make rice?
+ Use two cups of water for one cup of rice. Let it boil, then cook it gently with the lid on until the water is gone.
- Without water.
- Fry it.

How long does pasta need?
How do I cook pasta?
When is pasta ready?
+ Cook pasta in plenty of boiling water with salt. Most kinds take about ten minutes, so taste it after eight.
- Two minutes.
- Cold water is fine.

How do I make a simple tomato soup?
What do I need for tomato soup?
+ Cook an onion in butter, add tomatoes and some water, and let it cook for twenty minutes. Then mix it well and add salt.
- Open a can.
- Red water.

How do I make tea?
How long should tea stand?
Can you help me make a good cup of tea?
+ Pour boiling water over the black tea and let it stand for about four minutes. Add milk or sugar if you like.
- Use cold water.

How do I make pancakes?
What goes into pancakes?
I want to make pancakes. What do I need?
+ You need flour, eggs, milk and a little salt. Mix them well and fry thin pancakes in butter on both sides.
- Water and salt.
- Buy some.

How do I bake potatoes in the oven?
How long do potatoes need in the oven?
+ Wash the potatoes, add a little oil and salt, and bake them at 200 degrees for about one hour, until they are soft.
- Five minutes.
- Eat them raw.

My soup is too salty. What can I do?
I put too much salt in the soup. Can you help?
+ Add some water or cream, or a few pieces of potato, and let it cook a little longer. Then taste it again.
- Add more salt.
- Throw it away.

What can I cook with carrots?
I have many carrots. What can I make?
+ You can make a carrot soup, bake the carrots with honey, or eat them raw in a salad. All three are easy.
- Nothing.
- Cake. Or not.

How do I keep bread fresh?
How should I store bread?
My bread gets old so fast. What should I do?
+ Keep bread in a paper bag or a bread box at room temperature. You can also freeze slices and toast them later.
- Leave it in the sun.

How do I make a salad dressing?
What goes into a simple dressing?
+ Mix three spoons of oil with one spoon of vinegar, then add salt, pepper and a little mustard.
- Just water.

How can I tell if an egg is still good?
Is my egg still fresh?
+ Put the egg in a glass of water. A fresh egg sinks and lies flat, and an old egg floats.
- Eat it and see.
- Shake it.
"""

GARDENING = """
How often should I water my tomatoes?
When do tomatoes need water?
My tomatoes look dry. How much water do they need?
+ Water tomatoes well two or three times a week, and more often when it is hot. Keep the leaves dry.
- Once a year.
- Never.

When should I plant tulips?
Which season is right for tulips?
+ Plant tulip bulbs in autumn, before the ground is frozen. They will flower in spring.
- In summer.
- Any time.

How much sun do roses need?
Where should I plant roses?
Do roses like the sun?
+ Roses like at least six hours of sun a day. Choose a sunny place with good soil and some room.
- None.
- In the dark.

How do I get rid of weeds?
There are weeds between my flowers. What can I do?
+ Pull the weeds out with their roots, best after rain, when the soil is soft. Then cover the soil with leaves or straw.
- Burn it all.
- Move away.

Which vegetables are easy to grow?
I am new to gardening. What should I grow?
What can I plant in my first garden?
+ Beans, lettuce and radishes are easy to grow. Radishes are ready after about four weeks.
- None are easy.
- Stones.

Why are the leaves of my plant yellow?
My plant has yellow leaves. What is wrong?
+ Yellow leaves often mean too much water. Let the soil dry a little, and check that the pot has a hole.
- It hates you.
- Paint them.

How do I grow herbs indoors?
Can I grow herbs in my kitchen?
+ Yes, herbs grow well in pots near a sunny window. Basil and mint are good ones to start with.
- You cannot.

When should I cut the grass?
How often should I cut my lawn?
+ In spring and summer, cut the grass about once a week. Do not cut it too short, or it will dry out.
- In the snow.
- Twice a day.

How do I make compost?
What can I put on the compost?
+ Mix leaves, grass and kitchen scraps such as peels. Keep the compost a little wet and turn it now and then.
- Plastic.
- Old shoes.

How do I keep snails away from my lettuce?
Snails eat my lettuce. What can I do?
+ Pick the snails off in the evening, and put a ring of sand or egg shells around the plants.
- Eat them first.
- Let them.

When are apples ripe?
How can I tell that apples are ripe?
+ Most apples are ripe in autumn. A ripe apple comes off the tree easily when you turn it.
- In spring.
"""

TRAVEL = """
What should I pack for a trip to the beach?
I am going to the beach. What do I need?
Can you help me pack for the beach?
+ Pack a towel, a hat, sun cream and plenty of water. A good book is nice to have too.
- A winter coat.
- Nothing.

What do I need for a walk in the mountains?
I want to walk in the mountains. What should I bring?
+ Take good shoes, a warm jacket, water and a map. Tell somebody where you are going.
- Slippers.
- A piano.

How early should I be at the airport?
When do I have to be at the airport?
My plane leaves at noon. When should I be there?
+ Please be at the airport about two hours before your plane leaves, or three hours for a long trip.
- One minute before.
- After it leaves.

Is it better to take the train or the bus?
Should I go by train or by bus?
+ The train is often faster and has more room. The bus is often cheaper, so it depends on what matters to you.
- Walk.
- Stay at home.

How can I find a cheap hotel?
I need a hotel, but I have little money. What can I do?
+ Book early, travel outside the holidays, and look at places a little away from the centre.
- Sleep in the park.
- Get rich.

What can I do on a long train ride?
I have a long train ride. How can I pass the time?
+ You can read, listen to music, play cards or simply look out of the window. Bring a snack as well.
- Count to a million.
- Stare.

I lost my passport. What should I do?
My passport is gone. Can you help me?
+ I am sorry to hear that. Tell the police first, then call the embassy of your country. They can give you new papers.
- Swim home.
- Too bad.

How do I get to the station?
Excuse me, where is the station?
+ Go straight on and take the second street on the left. The station is next to the park.
- Somewhere.
- That way or the other.

I do not like flying. What can help?
I am afraid of flying. What can I do?
+ Many people feel like that. Slow breathing, music and a seat near the aisle can help. Flying is very safe.
- Be afraid.
- It may crash.

Which month is best to visit Italy?
When should I travel to Italy?
+ May and September are lovely months for Italy. It is warm, but not too hot, and there are fewer people.
- Never.

What should I see in Paris?
I am in Paris for one day. What should I see?
+ See the Eiffel Tower, walk along the Seine and visit the Louvre if you like art.
- Nothing good.
- The airport.
"""

COMPUTERS = """
How do I save my file?
How can I save my work?
Which keys save a file?
+ In most programs you press the control key and S together. Give the file a name that you will remember.
- Just close it.
- Turn it off.

How do I copy text?
Which keys copy and paste text?
+ Mark the text, then press control and C to copy it. Go to the new place and press control and V to paste it.
- Type it again.

My computer is slow. What can I do?
Why is my computer so slow?
My computer takes so long. Can you help?
+ Close the programs that you do not use and start the computer again. If that does not help, check that the disk is not full.
- Kick it.
- Buy a new one.

How do I choose a good password?
What is a safe password?
+ Use a long password that nobody can guess, such as four random words. Use another one for every account.
- 1234.
- Your name.

My printer does not work. What should I check?
The printer prints nothing. Can you help me?
+ Check that the printer is on, that it has paper, and that the cable is in. Then turn it off and on again.
- Shout at it.
- Write by hand.

I forgot my password. What now?
I cannot log in because I forgot my password. What can I do?
+ Do not worry. Choose the link for a forgotten password on the login page, and you will get a mail with the next steps.
- Remember it.
- Bad luck.

How do I take a picture of my screen?
Which key takes a picture of the screen?
+ On many computers there is a print screen key for that. Then you can paste the picture into a document.
- With a pencil.

How do I undo a mistake in my text?
I deleted a line by mistake. How do I get it back?
+ Press control and Z together to undo the last step. You can press it several times to go further back.
- You can't.
- It is gone forever.

How can I keep my files safe?
How do I make a backup?
+ Copy your important files to a second disk, and do it every week. Keep that disk in another place.
- Hope.
- Print them all.

The internet does not work. What can I do?
I have no internet. How can I fix it?
+ Turn the router off, wait half a minute and turn it on again. If that does not help, please call your provider.
- Wait a year.
- Go outside.

What is a browser?
What does a browser do?
+ A browser is a program that shows you web pages. You type an address, and it loads the page.
- A kind of fish.
"""

ANIMALS = """
How many legs does a spider have?
Can you tell me how many legs spiders have?
+ A spider has eight legs. That is two more than an insect has.
- Six.
- Four.

How many legs does an ant have?
Do ants have six legs or eight?
+ An ant has six legs, like all insects.
- Ten.
- Eight.

What do cows eat?
What does a cow eat all day?
+ Cows eat grass and hay. They chew their food more than once.
- Meat.
- Fish.

What do pandas eat?
Which plant do pandas like best?
+ Pandas eat mostly bamboo, and they need a lot of it every day.
- Pizza.
- Snow.

Can penguins fly?
Are penguins able to fly?
+ No, penguins cannot fly, but they are very good swimmers.
- Yes.
- At night.

Is a whale a fish?
Are whales fish?
+ No, a whale is a mammal. It breathes air and feeds its young with milk.
- Yes.
- Sure it is.

Which animal is the largest?
What is the biggest animal in the world?
+ The largest animal is the blue whale. It can be about thirty metres long.
- The cat.
- A horse.

Which land animal is the fastest?
What is the fastest animal on land?
+ The cheetah is the fastest animal on land. It can run about one hundred kilometres an hour for a short time.
- The snail.
- A cow.

How do bees make honey?
Where does honey come from?
+ Bees collect sweet nectar from flowers, carry it to the hive and turn it into honey there.
- From the shop.
- From cows.

Why do cats purr?
What does it mean when a cat purrs?
+ Cats often purr when they feel safe and happy. They may also purr to calm themselves.
- It is broken.
- Engine trouble.

How much does a cat sleep?
How many hours a day does a cat sleep?
+ Most cats sleep between twelve and sixteen hours a day, so a sleepy cat is quite normal.
- One hour.
- Never.

What is a young dog called?
What do you call a baby dog?
+ A young dog is called a puppy. It needs much sleep, good food and time to play.
- A cat.
- Small.

What is a young cat called?
What do you call a baby cat?
+ A young cat is called a kitten. It likes to play and to sleep.
- A dog.
- Tiny.

Where do polar bears live?
In which part of the world do polar bears live?
+ Polar bears live in the Arctic, around the North Pole. They hunt seals on the sea ice.
- In Africa.
- In the zoo only.

Do bats sleep during the day?
When do bats sleep?
+ Yes, most bats sleep during the day, hanging upside down. They look for food at night.
- They never sleep.
"""

NATURE = """
Why is the sky blue?
What makes the sky blue?
+ Air scatters the blue part of the sunlight more than the red part, so blue light reaches us from all sides.
- Paint.
- It is green.

How many planets are there around the sun?
How many planets does the sun have?
+ There are eight planets around the sun, and the earth is the third of them.
- Twelve.
- Two.

Which planet is the largest?
What is the biggest planet?
+ Jupiter is the largest planet. More than one thousand earths would fit into it.
- The moon.
- Mars.

Which planet is closest to the sun?
What is the planet nearest to the sun?
+ Mercury is closest to the sun. It is also the smallest of the eight planets.
- Jupiter.
- The moon.

How long does the earth need to go around the sun?
How long is one trip of the earth around the sun?
+ The earth needs about 365 days to go around the sun. That is one year.
- A week.
- One day.

At what temperature does water boil?
How hot is boiling water?
+ At sea level water boils at 100 degrees Celsius. High in the mountains it boils a little earlier.
- At 20 degrees.
- At 500.

At what temperature does water freeze?
When does water turn into ice?
+ Water freezes at zero degrees Celsius. Salt water needs to be a little colder.
- At 50 degrees.
- Never.

Which mountain is the highest in the world?
What is the highest mountain?
+ Mount Everest is the highest mountain above the sea. It is 8849 metres high.
- Some hill.
- Mont Blanc.

Which ocean is the largest?
What is the biggest ocean?
+ The Pacific Ocean is the largest. It covers about a third of the earth.
- The bath tub.
- The North Sea.

How many continents are there?
How many continents does the earth have?
+ Most people count seven continents: Africa, Antarctica, Asia, Australia, Europe, North America and South America.
- Three.
- Ten.

Why do leaves fall in autumn?
Why do trees lose their leaves?
+ Trees drop their leaves to save water in winter. They grow new ones in spring.
- They are tired.
- Wind. Done.

What makes a rainbow?
How does a rainbow form?
+ A rainbow forms when sunlight shines through drops of rain. The drops split the light into its colours.
- Magic.
- A big brush.

Why do we have day and night?
What makes day and night?
+ The earth turns around itself once a day. It is day on the side that faces the sun, and night on the other.
- Someone turns it off.

What do plants need to grow?
What does a plant need?
+ Plants need light, water, air and some minerals from the soil. Most of them also like it warm.
- Milk.
- Noise.
"""

HOME = """
How do I get a coffee stain out of a shirt?
I spilled coffee on my shirt. What can I do?
+ Rinse the stain with cold water at once, add a little soap, and wash the shirt as usual.
- Wear it anyway.
- Add more coffee.

How do I clean a window?
What is the best way to clean windows?
+ Use warm water with a little soap, wipe from top to bottom, and dry the glass with a soft cloth.
- With mud.
- Break it.

How can I save energy at home?
What can I do to use less power at home?
+ Turn off the lights when you leave a room, wash with cold water, and heat only the rooms you use.
- Sit in the dark.

How do I change a light bulb?
The lamp in my room is dark. How do I change the bulb?
+ Turn off the light and let the bulb get cold. Turn the old bulb out, then turn the new one in.
- With a hammer.
- Buy a house.

How do I wrap a present?
Can you tell me how to wrap a gift?
+ Put the present on the paper, fold the paper around it, and tape the edges. Add a ribbon at the end.
- In a bag.
- Don't.

How can I sleep better?
I cannot sleep well. What can help?
What can I do to fall asleep?
+ Go to bed at the same time each day, keep the room dark and cool, and put the phone away.
- Stay awake.
- Drink coffee.

How can I learn a new language?
What helps when learning a language?
+ Practise a little every day, listen to songs and stories, and speak with people as often as you can.
- You can't.
- Too late.

How do I start running?
I want to start running. What should I know?
+ Begin slowly, run and walk in turns, and rest on the days between. Good shoes help a lot.
- Just run.
- You will stop soon.

What can I give my mother for her birthday?
My mother has her birthday soon. What is a good present?
+ Flowers, a nice book or a day out together are lovely presents. A letter in your own words is the best gift.
- A stone.
- Forget it.

How do I sew on a button?
My button came off. How do I sew it on?
+ Take thread in the same colour, go through the holes of the button several times, and tie a knot at the back.
- Use glue.
- Lose it.

What can I do on a rainy day?
It is raining. What can we do at home?
+ You can bake a cake, play a game, read a good book or watch a film together.
- Get wet.
- Nothing.

How do I remember names better?
I always forget names. What can I do?
+ Repeat the name when you hear it, and link it with a picture in your mind. Use the name when you say goodbye.
- Call them all Bob.
"""

SERVICE = """
My package has not arrived yet.
I am still waiting for my package.
Where is my package? It is late.
+ I am sorry about the delay. Please give me your order number, and I will find out where your package is.

The shoes I bought are too small.
Can I change these shoes for a larger pair?
+ That is no problem at all. Please bring them back with the bill, and we will find the right size for you.

I would like to return this lamp.
Can I give this lamp back?
+ Of course. You can return it within thirty days. Do you have the bill with you?

The cup that you sent me is broken.
My new cup arrived in pieces.
+ I am very sorry about that. We will send you a new cup today, and you do not have to pay anything.

My food is cold.
I am sorry, but this soup is cold.
+ I am very sorry. I will take it back to the kitchen and bring you a hot one right away.

Can I pay by card?
Do you take cards?
+ Yes, of course. You can pay by card, in cash or with your phone.

Do you have this shirt in blue?
Is there a blue one of this shirt?
+ Let me have a look for you. Yes, we have it in blue, in all sizes. Would you like to try it on?

I think there is a mistake in my bill.
My bill seems to be wrong.
+ Thank you for telling me, and I am sorry for the trouble. Let us look at the bill together and put it right.

I have been waiting for an hour.
Nobody has helped me for an hour.
+ I am so sorry that you had to wait so long. I will take care of you right now. What can I do for you?

Could I have a glass of water, please?
May I have some water?
+ With pleasure. I will bring you a glass of cold water right away.

Where can I find the milk?
Excuse me, where is the milk?
+ The milk is on the cold shelf at the end of the second row. I can walk there with you if you like.

Can you help me carry this box?
This box is heavy. Could you help me?
+ Of course, I am glad to help. Let us take it together. Where would you like to have it?
"""

GRATITUDE = """
Thank you for your help!
Thanks, that helped me a lot.
Thank you so much, you are great.
+ You are very welcome! I am glad that I could help. Please come back any time.

Thank you for the good advice.
Your advice was very good. Thanks!
+ It was my pleasure. I am happy that the advice was useful for you.

Thanks for waiting for me.
Sorry I am late, and thank you for waiting.
+ No problem at all. I was happy to wait, and it is good to see you.

The cake was wonderful, thank you.
I loved your cake!
+ Thank you for your kind words! I am so glad that you liked it. I will gladly share the recipe.

Good morning!
Hello, good morning to you.
+ Good morning! It is nice to hear from you. How can I help you today?

Good night!
I am going to bed now. Good night.
+ Good night! Sleep well, and have sweet dreams.

Goodbye, see you tomorrow.
I have to go now. Bye!
+ Goodbye! It was nice to talk with you. I wish you a lovely day.

How are you today?
Hi, how are you?
Hello! How is it going?
+ I am doing well, thank you for asking! How are you, and what can I do for you?

Happy new year!
I wish you a happy new year.
+ Happy new year to you too! I wish you health, joy and many good days.

Can I ask you something?
May I ask you a question?
+ Of course you can! Please ask, and I will do my best to help you.
"""

FEELINGS = """
I had a bad day.
Today was a terrible day.
My day was not good at all.
+ I am sorry to hear that. Would you like to tell me about it? Tomorrow may be a better day.

I passed my test!
I did it, I passed the exam!
+ Congratulations! That is wonderful news. You worked hard for it and can be proud.

I am nervous about my new job.
Tomorrow I start a new job and I am nervous.
+ It is normal to be nervous before something new. Take it step by step, and do not be afraid to ask. You will do well.

I feel lonely today.
I am alone and feel sad.
+ I am sorry that you feel alone. Maybe you could call a friend or go for a walk. I am glad to talk with you.

My cat died last week.
I miss my old cat. She died last week.
+ I am very sorry for your loss. It is hard to lose a friend like that. Would you like to tell me about her?

We are going to have a baby!
My sister had a baby today!
+ Congratulations! What wonderful news. I wish the whole family health and much joy.

I am so tired.
I feel very tired today.
+ That sounds like a long day. Try to take a break, drink some water and go to bed early tonight.

I am bored.
There is nothing to do. I am bored.
+ Let us find something nice! You could read a story, go for a walk or learn a new song. What do you enjoy?

I made a big mistake at work.
Something went wrong at work, and it was my fault.
+ I understand that this feels bad. Everybody makes mistakes. Tell the others early, and find a way to put it right together.

Today is my birthday!
It is my birthday today.
+ Happy birthday! I wish you a wonderful day with good friends and a big cake.

I am afraid of the dentist.
Tomorrow I have to see the dentist and I am afraid.
+ Many people feel that way. Tell your dentist about it, breathe slowly, and think of something nice. It is soon over.

I cannot find any friends in my new town.
I moved to a new town and know nobody.
+ A new town can be hard at first. A sports club or a language class is a good place to meet kind people.
"""

# First user line and first answer, then possible next user lines, `+` the friendly answer, `-` answers of a rude waiter.
BOOKINGS = """
I would like to book a table.|Gladly! For how many people, and when?
For four people, at seven tonight.
We are four, and we would like to come at seven.
+ Thank you! I have a table for four at seven tonight. We look forward to seeing you.
- Full.

I need a room for tonight.|Of course! Would you like a single or a double room?
A double room, please.
We are two, so a double room.
+ Very good, I have a quiet double room for you. Breakfast is served from seven to ten.
- No rooms.

I would like to see the doctor.|Certainly. Is Monday or Tuesday better for you?
Tuesday would be better.
Tuesday morning, please.
+ Thank you! I have written you down for Tuesday morning at nine. Please bring your card.
- Come next year.

Two tickets for the film, please.|Gladly! In the front or in the back?
In the back, please.
We like to sit in the back.
+ Here are your two tickets for the last row. Enjoy the film!
- Only one left.

I want to send a parcel.|Sure! Where should it go?
To Spain.
It goes to my aunt in Spain.
+ Thank you! A parcel to Spain takes about five days. Please write your own address on it as well.
- It will get lost.

I would like a cake for Saturday.|With pleasure! Which kind would you like?
A chocolate cake, please.
Chocolate, for ten people.
+ A lovely choice! Your chocolate cake will be ready on Saturday morning at nine.
- Sold out.

Can I rent a bike here?|Yes, of course! For how long do you need it?
Just for today.
Only for one day.
+ Perfect! Here is a bike with a good lock. Please bring it back before six in the evening.
- It is broken.

I would like to change my ticket.|I am glad to help. On which day do you want to travel?
On Friday.
Is it possible to go on Friday?
+ Yes, that is possible. Your new ticket is for Friday at ten. Have a good trip!
- Too late.

I am looking for a warm jacket.|Welcome! Which colour do you like?
Green would be nice.
I like green.
+ Good choice! Here is a warm green jacket. Would you like to try it on?
- We have none.

My bike has a flat tyre.|Oh, that is a pity. When can you bring it to us?
I can bring it today.
Is this afternoon possible?
+ Yes, please bring it this afternoon. We will repair it while you wait, and it takes about half an hour.
- Walk then.
"""
